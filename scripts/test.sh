#!/usr/bin/env bash
# All checks: style, types, tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" dev
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
.venv/bin/basedpyright
exec "$PYTHON" -m pytest "$@"
