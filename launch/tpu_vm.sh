#!/usr/bin/env bash
# Train on a slice of Cloud TPU VMs: make it, run on all its hosts, and make it anew when it is preempted.
#
#   NAME=t5 ZONE=us-central2-b TYPE=v4-16 launch/tpu_vm.sh [--dry_run] RECIPE MODEL_DIR [FLAGS OF mtjax train]
#
# From the environment: VERSION of the runtime (tpu-ubuntu2204-base), SPOT (set: a spot slice), PACKAGE to install
# (mtjax[tpu]), SETUP (a command to run before on every host, such as a mount), RETRIES (20), RETRY_WAIT seconds (60).
# RECIPE (one of mtjax's own, or a file), MODEL_DIR and the cache lie where all hosts see them. The slice stays until it is deleted.
set -euo pipefail
usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
dry_run=false
if [[ ${1:-} == --dry_run ]]; then dry_run=true; shift; fi
[[ $# -ge 2 && $1 != -* ]] || usage
recipe=$1 model_dir=$2
shift 2
: "${NAME:?of the slice}" "${ZONE:?of the slice, such as us-central2-b}" "${TYPE:?of the slice, such as v4-16}"
retries=${RETRIES:-20}
tpus=(gcloud compute tpus tpu-vm)
create=("${tpus[@]}" create "$NAME" "--zone=$ZONE" "--accelerator-type=$TYPE"
    "--version=${VERSION:-tpu-ubuntu2204-base}" ${SPOT:+--spot})
describe=("${tpus[@]}" describe "$NAME" "--zone=$ZONE" "--format=value(state)")
delete=("${tpus[@]}" delete "$NAME" "--zone=$ZONE" --quiet)
# Its own Python: the image's may be older than mtjax needs.
install="python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing --python=3.11 .mtjax"
install+=" && python3 -m uv pip install --quiet --python=.mtjax/bin/python $(printf '%q' "${PACKAGE:-mtjax[tpu]}")"
train=$(printf '%q ' .mtjax/bin/mtjax train "--gin_file=$recipe" "--gin.MODEL_DIR=$model_dir" "$@")
train="${SETUP:-true} && $install && $train; echo mtjax exit code \$?"
run=("${tpus[@]}" ssh "$NAME" "--zone=$ZONE" --worker=all "--command=$train")

if $dry_run; then
    for line in create run delete; do
        declare -n words=$line
        printf '%q ' "${words[@]}"
        echo
    done
    exit
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
for ((attempt = 0; ; attempt++)); do
    state=$("${describe[@]}" 2>/dev/null || true)
    if [[ -n $state && $state != READY ]]; then "${delete[@]}"; fi
    if [[ $state == READY ]] || "${create[@]}"; then
        "${run[@]}" 2>&1 | tee "$log" || true
        codes=$(sed -n 's/.*mtjax exit code \([0-9]*\)$/\1/p' "$log" | sort -un | tr '\n' ' ')
        if [[ $codes == "0 " ]]; then exit; fi
        for code in $codes; do
            case $code in
            0 | 75 | 137 | 143) ;; # asks for another try, or was killed
            *) exit "$code" ;;     # repeating will not help
            esac
        done
    fi # no code at all: the slice is gone, or there was no room for it
    if ((attempt >= retries)); then exit 75; fi
    echo "tpu_vm.sh: trying again ($((attempt + 1)) of $retries)" >&2
    sleep "${RETRY_WAIT:-60}"
done
