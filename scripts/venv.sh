# Makes .venv in the project's root, or reuses it, and installs the project with the extras named in $1.
# Sourced by the other scripts; afterwards "$PYTHON" is the environment's Python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=.venv/bin/python
stamp=".venv/installed-$1"
if [ ! -x "$PYTHON" ]; then
    found=""
    for candidate in "${PYTHON3:-}" python3 python3.13 python3.12 python3.11 python3.10; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
            found=$candidate
            break
        fi
    done
    if [ -z "$found" ]; then
        echo "Error: Python 3.10 to 3.13 is needed (name it with PYTHON3=/path/to/python3)" >&2
        exit 2
    fi
    "$found" -m venv .venv
fi
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
    echo "Installing into .venv (once)..."
    "$PYTHON" -m pip install --quiet --constraint constraints.txt --editable ".[$1]"
    touch "$stamp"
fi
