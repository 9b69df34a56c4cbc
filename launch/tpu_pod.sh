#!/usr/bin/env bash
# A run on all hosts of a Cloud TPU slice, started from anywhere that has gcloud.
# Use: TPU=my-pod ZONE=us-east5-a bash launch/tpu_pod.sh --config=... --workdir=...
# On every host: the repository at REPOSITORY (~/dmq_jax) with a .venv of requirements-tpu.txt, and
# one disk that all mount for --workdir. PROJECT is gcloud's own if not given.
# Status 75 means stopped (a maintenance event) and saved: the same command goes on from there.
set -euo pipefail
: "${TPU:?name the TPU: TPU=my-pod ZONE=... bash launch/tpu_pod.sh ...}"
: "${ZONE:?name its zone: ZONE=us-east5-a}"
repository=${REPOSITORY:-'~/dmq_jax'}
arguments=
[ $# -eq 0 ] || printf -v arguments ' %q' "$@"
# auto: the hosts of a slice are known to jax from the machine itself.
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} \
    --worker=all \
    --command="cd $repository && .venv/bin/python -m dmq_jax.main --coordinator=auto$arguments"
