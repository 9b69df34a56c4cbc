# shellcheck shell=bash
# Sourced by the launch scripts: enters the repository and makes its .venv with what is asked for.
# Use: source launch/environment.sh REQUIREMENTS_FILE...
# PYTHON names another interpreter (3.11 or newer); the environment is reused while the
# requirements files stay the same.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "Error: $PYTHON is $("$PYTHON" --version 2>&1 || true): Python 3.11 or newer is needed;" \
        "name one with PYTHON=/path/to/python3.11 bash $0" >&2
    exit 2
fi
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
wanted=$(cat "$@" | cksum)
if [ "$(cat ".venv/installed-$(basename "$1" .txt)" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing $* into .venv ..."
    arguments=()
    for file in "$@"; do arguments+=(-r "$file"); done
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${arguments[@]}"
    echo "$wanted" >".venv/installed-$(basename "$1" .txt)"
fi
