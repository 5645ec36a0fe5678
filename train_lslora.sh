#!/usr/bin/env bash
# Fine-tune with LS-LoRA.
#
#   bash train_lslora.sh [smollm2]   the embedded model on the embedded data: a few minutes on 2 CPU cores
#   bash train_lslora.sh phi3        the reference recipe: Phi-3-mini, 500 steps; needs a CUDA device and a model hub
#
# What follows the recipe's name is handed to train_lslora.py and overrides the recipe, e.g.
#   bash train_lslora.sh smollm2 --method lora --output_dir outputs/smollm2-lora
# Paths in it are those of whoever calls; the recipe's own are in the repository.
#
# LAUNCH starts it on several GPUs, or CPU processes; scripts/accelerate has configurations for DDP, FSDP 2 and ZeRO-3:
#   LAUNCH="accelerate launch --config_file scripts/accelerate/fsdp2.yaml" bash train_lslora.sh phi3   (from here)
set -euo pipefail
repository=$(CDPATH="" cd "$(dirname "$0")" && pwd)
at=$repository/
[ "$PWD" = "$repository" ] && at= # names in records and cards are short then

recipe=${1:-smollm2}
[ $# -gt 0 ] && shift

case $recipe in
smollm2)
    arguments=(
        --model_name smollm2
        --dataset_path "${at}dataset/commonsense_mini/train.jsonl"
        --eval_dataset_path "${at}dataset/commonsense_mini/test.jsonl"
        --output_dir "${at}outputs/smollm2-lslora"
        --max_steps 44 --batch_size 8 --learning_rate 2e-3 --lr_scheduler_type cosine --warmup_steps 5
        --lora_dropout 0 --spline_lr 1e-2
        --group_by_length --max_length 256 --save_steps 22 --logging_steps 5
    )
    ;;
phi3)
    missing=()
    command -v nvidia-smi >/dev/null || missing+=("a CUDA device (nvidia-smi is not there)")
    [ -f "${at}dataset/commonsense_5k.json" ] || missing+=(
        "${at}dataset/commonsense_5k.json (python ${at}dataset/prepare_commonsense.py --output_dir ${at}dataset makes it)")
    if [ ${#missing[@]} -gt 0 ]; then
        echo "error: the phi3 recipe cannot run here; it needs" >&2
        printf -- '- %s\n' "${missing[@]}" >&2
        exit 2
    fi
    arguments=(
        --model_name microsoft/Phi-3-mini-4k-instruct
        --dataset_path "${at}dataset/commonsense_5k.json"
        --output_dir "${at}outputs/phi3-lslora"
        --max_steps 500 --batch_size 4 --learning_rate 2e-4 --bf16 --optim paged_adamw_32bit
        --r 16 --lora_alpha 32 --lora_dropout 0.05 --target_modules all-linear
        --num_knots 5 --k_min -3 --k_max 3 --spline_reg_weight 0.01 --interpolation_method piecewise
    )
    ;;
*)
    echo "error: the recipe must be smollm2 or phi3, got '$recipe'" >&2
    exit 2
    ;;
esac

pushd "$repository" >/dev/null
source scripts/environment.sh train
popd >/dev/null
exec ${LAUNCH:-python} "${at}train_lslora.py" "${arguments[@]}" "$@"
