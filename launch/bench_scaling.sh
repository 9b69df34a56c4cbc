#!/usr/bin/env bash
# Weak and strong scaling of one step as a Markdown table, over the devices and processes given.
# Use: bash launch/bench_scaling.sh [finetuning|sampling] [further arguments of dmq_jax.scaling]
# DEVICES ("1 2 4 8") and PROCESSES (2) are how many; BATCH (8) is per device where the work grows
# with them, and in all where it does not. GPUs are used and timed if there are; else CPU devices are
# emulated, of which work, memory and traffic count, not time. PYTHON as in launch/local.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
step=${1:-finetuning}
shift || true
devices=${DEVICES:-1 2 4 8}
processes=${PROCESSES:-2}
batch=${BATCH:-8}
largest=${devices##* }
python=${PYTHON:-.venv/bin/python}
export PYTHON=$python MODULE=dmq_jax.scaling

# Processes, devices of all of them, mesh, images of all of them.
row() {
    CPU_DEVICES=$(($2 / $1)) bash launch/local.sh "$1" --step="$step" --mesh="$3" \
        --batch-size="$4" "${@:5}"
}

"$python" -m dmq_jax.scaling --header
for count in $devices; do row 1 "$count" "data=$count" $((batch * count)) "$@"; done
for count in $devices; do
    # One device has had its row; a batch that does not divide has none.
    if [ "$count" -gt 1 ] && [ $((batch % count)) -eq 0 ]; then
        row 1 "$count" "data=$count" "$batch" "$@"
    fi
done
[ "$largest" -eq 1 ] || row 1 "$largest" "fsdp=$largest" $((batch * largest)) "$@"
if [ "$processes" -gt 1 ] && [ $((largest % processes)) -eq 0 ]; then
    row "$processes" "$largest" "data=$largest" $((batch * largest)) "$@"
fi
