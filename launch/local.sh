#!/usr/bin/env bash
# Train in several processes on this machine, and go on after a preemption or the loss of a process.
#
#   launch/local.sh [--dry_run] RECIPE MODEL_DIR [FLAGS OF mtjax train]
#
# From the environment: PROCESSES (2), PORT (12421), RETRIES (20), RETRY_WAIT seconds (5), MTJAX (mtjax).
set -euo pipefail
usage() { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
dry_run=false
if [[ ${1:-} == --dry_run ]]; then dry_run=true; shift; fi
[[ $# -ge 2 && $1 != -* ]] || usage
recipe=$1 model_dir=$2
shift 2
processes=${PROCESSES:-2} retries=${RETRIES:-20}
command=("${MTJAX:-mtjax}" train "--gin_file=$recipe" "--gin.MODEL_DIR=$model_dir" "$@"
    "--coordinator_address=localhost:${PORT:-12421}" "--process_count=$processes")

if $dry_run; then
    for ((i = 0; i < processes; i++)); do printf '%q ' "${command[@]}" "--process_index=$i"; echo; done
    exit
fi

pids=() asked_to_stop=false
stop() {
    asked_to_stop=true
    kill -TERM "${pids[@]}" 2>/dev/null || true
}
trap stop TERM INT

wait_for() { # an exit code, also where a signal interrupts the waiting
    local code=0
    while true; do
        wait "$1" && code=0 || code=$?
        kill -0 "$1" 2>/dev/null || break
    done
    return "$code"
}

for ((attempt = 0; ; attempt++)); do
    pids=() worst=0
    for ((i = 0; i < processes; i++)); do
        "${command[@]}" "--process_index=$i" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do
        code=0
        wait_for "$pid" || code=$?
        case $code in
        0) ;;
        75 | 137 | 143) if ((worst == 0)); then worst=75; fi ;; # asks for another try, or was killed
        *) worst=$code ;;                                       # repeating will not help
        esac
    done
    if ((worst != 75)) || $asked_to_stop || ((attempt >= retries)); then exit "$worst"; fi
    echo "local.sh: trying again ($((attempt + 1)) of $retries)" >&2
    sleep "${RETRY_WAIT:-5}"
done
