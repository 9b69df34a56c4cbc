#!/usr/bin/env bash
# From a clean clone to a 4-bit diffusion model beside its float teacher: bash launch/quickstart.sh
# Makes .venv, runs configs/quickstart.py into runs/quickstart, and says where the report is.
# A second call reuses the environment and whatever the workdir already holds.
# Further arguments go to the program: bash launch/quickstart.sh --config.sample.num_images=500
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "$0")/environment.sh" requirements.txt
.venv/bin/python -m dmq_jax.main --config=configs/quickstart.py --workdir=runs/quickstart "$@"
echo "Open $PWD/runs/quickstart/report.html"
