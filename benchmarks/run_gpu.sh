#!/usr/bin/env bash
# Everything about the kernels that needs a GPU, in one go: tests, kernels, layers, training steps, inference, pictures.
# OUT is where the records go (benchmarks/results/speed by default).
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results/speed}
export PYTHONPATH=src:.${PYTHONPATH:+:$PYTHONPATH}

# Compiling is most of the tests' time, so they are run side by side where pytest-xdist is installed.
parallel=()
if python -c "import xdist" 2>/dev/null; then parallel=(-n auto); fi
python -m pytest -q "${parallel[@]}" tests/test_ops.py tests/test_update.py tests/test_launch.py \
    -k "triton or gpu"

python -m benchmarks.kernels --out "$OUT/kernels_cuda.json"
layers=(--tested --device cuda --providers base peft_lora lslora lslora_recommended)
python -m benchmarks.layer "${layers[@]}" --out "$OUT/layer_cuda.json"
python -m benchmarks.layer "${layers[@]}" --replayed --out "$OUT/layer_replayed_cuda.json"
# seed_naive does not fit beside the others here.
phi3=(--tested --device cuda --model Phi-3-mini)
step=("${phi3[@]}" --rows 1 --tokens 4096 --providers peft_lora lslora lslora_recommended)
python -m benchmarks.train_step "${step[@]}" --out "$OUT/train_step_cuda.json"
python -m benchmarks.train_step "${step[@]}" --gradient_checkpointing --out "$OUT/train_step_checkpointed_cuda.json"
python -m benchmarks.inference "${phi3[@]}" --tokens 512 --out "$OUT/inference_cuda.json"
for name in layer layer_replayed train_step train_step_checkpointed inference; do
    python -m benchmarks.draw_speed "$OUT/${name}_cuda.json"
done
