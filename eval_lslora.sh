#!/usr/bin/env bash
# Evaluate a trained adapter, and its base model beside it, on the embedded test split.
#
#   bash eval_lslora.sh DIR
#
# What follows is handed to eval_lslora.py and overrides, e.g. --dataset dataset/test/boolq.json --output boolq.json
set -euo pipefail

if [ $# -eq 0 ] || [ ! -f "$1/adapter_config.json" ]; then
    echo "usage: bash eval_lslora.sh DIR, with DIR the folder of a trained adapter (it holds adapter_config.json)" >&2
    exit 2
fi
adapter=$(CDPATH="" cd "$1" && pwd)
shift
repository=$(CDPATH="" cd "$(dirname "$0")" && pwd)

pushd "$repository" >/dev/null
source scripts/environment.sh train
popd >/dev/null # paths are those of whoever calls
exec python "$repository/eval_lslora.py" --adapter "$adapter" --base \
    --dataset "$repository/dataset/commonsense_mini/test.jsonl" --output "$adapter/evaluation.json" "$@"
