#!/usr/bin/env bash
# Style, types, and all tests with the line coverage of src/lslora. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
source scripts/environment.sh dev
ruff check .
ruff format --check .
mypy
# Small tensors gain nothing from threads; two processes of one thread each take half the time.
export OMP_NUM_THREADS=1
exec python -m pytest -n 2 --dist worksteal --cov=lslora --cov-report=term-missing:skip-covered --cov-fail-under=90 "$@"
