#!/usr/bin/env bash
# Try the newest of the libraries that we build on: all tests, and what of docs/compatibility.md changes, in a fresh copy
# and a fresh environment with their pins lifted. Takes packages as pip does, e.g. transformers or peft==0.22.0; by
# default all five. PIP_PRE=1 tries those before a release.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- peft transformers trl accelerate datasets
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git clone --quiet . "$work/lslora"
cd "$work/lslora"
for package; do
    name=${package%%[<>=!~]*}
    sed -i "s/\"$name[<>=][^\"]*\"/\"$name\"/" pyproject.toml
    sed -i "/^$name==/d" constraints.txt
done
LSLORA_VENV=$work/venv
source scripts/environment.sh dev
python -m pip install --quiet --upgrade --constraint constraints.txt "$@"
python -m pip list --format freeze | grep -E "^(peft|transformers|trl|accelerate|datasets)=="
export OMP_NUM_THREADS=1
failed=0
python -m pytest -n 2 --deselect tests/test_registry.py::test_other_peft_versions_are_refused_with_those_that_work \
    || failed=1
python -m tests.compatibility
git diff docs/compatibility.md
exit $failed
