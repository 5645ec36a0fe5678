#!/usr/bin/env bash
# Plans of benchmarks.quality, several runs at once: a run of a small model leaves most of a GPU idle.
#
#     DATA=folder bash benchmarks/run_gpu_quality.sh benchmarks/plans/math_all_layers.toml
#
# OUT is where results go (benchmarks/results by default), PROCESSES how many run at once (6 by default). What a time
# limit cuts off is done by the next call.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=src:.${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
: "${DATA:?must be the folder that the paths of a plan start from}"
failed=0
for plan in "$@"; do
    running=()
    for _ in $(seq "${PROCESSES:-6}"); do
        python -m benchmarks.quality --plan "$plan" --data "$DATA" --results "${OUT:-benchmarks/results}" &
        running+=($!)
    done
    for process in "${running[@]}"; do wait "$process" || failed=1; done  # the others are not left behind
done
exit "$failed"
