#!/usr/bin/env bash
# Are the integer kernels exact on the NVIDIA GPU here, and how fast are they? Both, as tables.
# Use: bash launch/bench_gpu.sh [folder, kernels/measured/NAME_OF_THE_GPU by default]
# Stops at the first kernel that is not exact. TUNE=1 looks for the best tiles of this GPU first;
# QUICK=1 tries the commands alone, on any device. PYTHON as in launch/local.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
layers=()
network=(--model=sd15 --dtype=bfloat16 --num_steps=20 --nomemory)
if [ -n "${QUICK:-}" ]; then
    layers=(--networks cifar10 --layers conv_4x4_256_256_k3 --batch-size 1 --rounds 1 --calls 1)
    network=(--model=bundled --batch_size=1 --num_steps=1 --num_rounds=1 --nomemory)
else
    "$python" -c 'import sys; from kernels import triton_shim; sys.exit(triton_shim.refusal())'
fi
name=$("$python" -c "import jax; print(jax.devices()[0].device_kind.replace(' ', '_'))")
folder=${1:-kernels/measured/$name}
mkdir -p "$folder"
"$python" -m pytest -q -rs -m gpu tests/kernels | tee "$folder/exactness.txt"
[ -z "${TUNE:-}" ] || "$python" -m kernels.tune
"$python" -m kernels.bench "${layers[@]}" --json "$folder/layers.json" | tee "$folder/layers.md"
for bits in '8 8' '4 8' '4 4'; do
    read -r weights activations <<<"$bits"
    "$python" -m dmq_jax.bench "${network[@]}" --rows=step_integer,sample_float,sample_integer \
        --weight_bits="$weights" --activation_bits="$activations" \
        --json="$folder/network_w${weights}a${activations}.json"
done | tee "$folder/networks.txt"
