#!/usr/bin/env bash
# All checks: style, types, tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" dev
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
.venv/bin/basedpyright
# A process per core, each with one thread: many tests are too small for two.
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest --numprocesses=logical --maxprocesses=8 --dist=worksteal "$@"
