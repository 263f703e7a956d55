#!/usr/bin/env bash
# A study as a Slurm array: each job takes runs until none is left; preempted jobs are requeued and go on.
#
#   sbatch --array=0-7 launch/study_slurm.sh studies/mini_scaling.gin --study_dir=/shared/DIR --cache_dir=/shared/CACHE
#
#SBATCH --job-name=mtjax-study
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output=%x-%A-%a.log
set -u
recipe=$1
shift
# One worker a job: several tasks in a job would be taken for the processes of one run.
mtjax study run "$recipe" "$@" --index="$SLURM_ARRAY_TASK_ID" --count="$SLURM_ARRAY_TASK_COUNT" &
worker=$!
trap 'kill -TERM $worker' TERM
wait $worker
code=$?
while kill -0 $worker 2>/dev/null; do # the trap has ended the first wait; the worker is saving
    wait $worker
    code=$?
done
if [ "$code" -eq 75 ]; then scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"; fi
exit "$code"
