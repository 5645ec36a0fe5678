#!/usr/bin/env bash
# Everything about the kernels that needs a GPU, in one go: tests, layers, training steps, inference, pictures.
# OUT is where the records go (benchmarks/results/speed by default).
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results/speed}
export PYTHONPATH=src:.${PYTHONPATH:+:$PYTHONPATH}

python -m pytest -q tests/test_ops.py tests/test_update.py
python -m benchmarks.layer --tested --device cuda --out "$OUT/layer_cuda.json"
# seed_naive does not fit beside the others here.
phi3=(--tested --device cuda --model Phi-3-mini)
step=("${phi3[@]}" --rows 1 --tokens 4096 --providers peft_lora lslora lslora_recommended)
python -m benchmarks.train_step "${step[@]}" --out "$OUT/train_step_cuda.json"
python -m benchmarks.train_step "${step[@]}" --gradient_checkpointing --out "$OUT/train_step_checkpointed_cuda.json"
python -m benchmarks.inference "${phi3[@]}" --tokens 512 --out "$OUT/inference_cuda.json"
for name in layer train_step train_step_checkpointed inference; do
    python -m benchmarks.draw_speed "$OUT/${name}_cuda.json"
done
