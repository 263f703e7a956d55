#!/usr/bin/env bash
# Train on the nodes of a Slurm job, one process a GPU; the job requeues itself after a preemption or a lost node.
#
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-task=1 --time=24:00:00 launch/slurm.sh RECIPE MODEL_DIR [FLAGS OF mtjax train]
#   launch/slurm.sh --dry_run RECIPE MODEL_DIR [FLAGS]
#
# From the environment: CONTAINER (an image for pyxis' --container-image; default none), MOUNTS (for it), RETRIES (20),
# MTJAX (mtjax). MODEL_DIR and the cache lie on storage that all nodes see.
#SBATCH --job-name=mtjax
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail
usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
dry_run=false
if [[ ${1:-} == --dry_run ]]; then dry_run=true; shift; fi
[[ $# -ge 2 && $1 != -* ]] || usage
recipe=$1 model_dir=$2
shift 2
command=(srun --kill-on-bad-exit=0 --label ${CONTAINER:+"--container-image=$CONTAINER"}
    ${MOUNTS:+"--container-mounts=$MOUNTS"}
    "${MTJAX:-mtjax}" train "--gin_file=$recipe" "--gin.MODEL_DIR=$model_dir" "$@")

if $dry_run; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi

code=0
"${command[@]}" || code=$?
case $code in # the highest of all processes
75 | 137 | 143) # asks for another try, or was killed; a node that fails is requeued by Slurm
    if ((${SLURM_RESTART_COUNT:-0} < ${RETRIES:-20})); then scontrol requeue "$SLURM_JOB_ID"; fi
    ;;
esac
exit "$code"
