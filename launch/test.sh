#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them all: bash launch/test.sh
# Further arguments go to pytest: bash launch/test.sh tests/quant -k observers
# 'slow' and 'gpu' tests are left out; add them with: bash launch/test.sh -m "slow or gpu"
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "$0")/environment.sh" requirements-test.txt requirements-text.txt requirements.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# One process per core; a file stays whole, since its tests share what they compile.
exec .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
