#!/usr/bin/env bash
# Train on TPU slices of a GKE cluster, as a JobSet: Kubernetes restarts it after a preemption or a lost node.
#
#   NAME=t5 IMAGE=REGISTRY/mtjax:1 BUCKET=mine launch/gke.sh [--dry_run] RECIPE /bucket/t5 [FLAGS OF mtjax train]
#
# From the environment: ACCELERATOR (tpu-v5-lite-podslice), TOPOLOGY (8x8), HOSTS of a slice (16), CHIPS of a host (4),
# SLICES (1), SERVICE_ACCOUNT (default), RETRIES (20). The cluster has JobSet, the GCS FUSE driver and node pools of
# this kind; IMAGE holds mtjax[tpu] (and RECIPE, unless it is in the bucket or one of mtjax's own); BUCKET (hierarchical, so that renames are atomic) is mounted at /bucket.
set -euo pipefail
usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
apply=(kubectl apply -f -)
if [[ ${1:-} == --dry_run ]]; then apply=(cat); shift; fi
[[ $# -ge 2 && $1 != -* ]] || usage
recipe=$1 model_dir=$2
shift 2
: "${NAME:?of the JobSet}" "${IMAGE:?with mtjax[tpu]}" "${BUCKET:?to mount at /bucket}"
hosts=${HOSTS:-16}

quoted() { # a YAML string
    local text=${1//\\/\\\\}
    printf '"%s"' "${text//\"/\\\"}"
}
arguments() {
    local argument
    for argument in train "--gin_file=$recipe" "--gin.MODEL_DIR=$model_dir" --grace_time=110 "$@"; do
        printf '\n                    - %s' "$(quoted "$argument")"
    done
}

"${apply[@]}" <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(quoted "$NAME")
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${RETRIES:-20}
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: ${SLICES:-1}
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: Count # preempted, drained: the JobSet restarts
                onPodConditions:
                  - type: DisruptionTarget
                    status: "True"
              - action: FailJob # repeating will not help
                onExitCodes:
                  operator: NotIn
                  values: [75, 137, 143]
          template:
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
            spec:
              serviceAccountName: $(quoted "${SERVICE_ACCOUNT:-default}")
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $(quoted "${ACCELERATOR:-tpu-v5-lite-podslice}")
                cloud.google.com/gke-tpu-topology: $(quoted "${TOPOLOGY:-8x8}")
              containers:
                - name: train
                  image: $(quoted "$IMAGE")
                  command: [mtjax]
                  args:$(arguments "$@")
                  resources:
                    limits:
                      google.com/tpu: ${CHIPS:-4}
                  volumeMounts:
                    - name: bucket
                      mountPath: /bucket
              volumes:
                - name: bucket
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: $(quoted "$BUCKET")
                      mountOptions: implicit-dirs
YAML
