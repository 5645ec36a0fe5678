#!/usr/bin/env bash
# Try the newest peft: the tests of what we build on it, and what of docs/compatibility.md changes, in a fresh copy and
# a fresh environment with the one pin (pyproject.toml) lifted. Arguments go to pip, e.g. --pre or peft==0.22.0.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git clone --quiet . "$work/lslora"
cd "$work/lslora"
sed -i 's/"peft>=[^"]*"/"peft"/' pyproject.toml
sed -i '/^peft==/d' constraints.txt
LSLORA_VENV=$work/venv
source scripts/environment.sh dev
python -m pip install --quiet --upgrade --constraint constraints.txt peft "$@"
python -m pip show peft | sed -n 1,2p
failed=0
python -m pytest --deselect tests/test_registry.py::test_other_peft_versions_are_refused_with_those_that_work \
    tests/test_{registry,config,layer,layer_kinds,placement,checkpoints,trainers,compatibility}.py || failed=1
python -m tests.compatibility
git diff docs/compatibility.md
exit $failed
