#!/usr/bin/env bash
# From a bare machine to pictures: installs into .venv, then trains, samples and measures on the CPU or GPU at hand.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" report
exec "$PYTHON" scripts/quickstart.py "$@"
