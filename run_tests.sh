#!/usr/bin/env bash
# Style, types, and all tests with the line coverage of src/lslora. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
source scripts/environment.sh dev
ruff check .
ruff format --check .
mypy
# Threads that wait by spinning are what slows small tensors down on few cores.
export OMP_WAIT_POLICY=passive
exec python -m pytest --cov=lslora --cov-report=term-missing:skip-covered --cov-fail-under=90 "$@"
