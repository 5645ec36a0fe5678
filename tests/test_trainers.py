"""TRL's trainers and transformers' own: two real steps each, with the penalty and the log entries in place."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from test_training import WORDS, model, rows, settings, splines, tokenized, tokenizer
from torch.nn.functional import cross_entropy
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from lslora import LSLoraConfig
from lslora.training import SplineTrainerMixin

CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def pairs():
    return rows().map(lambda row, i: {"chosen": row["completion"], "rejected": f" {WORDS[i % 3]}"}, with_indices=True)


def preferences():
    return (
        pairs()
        .map(lambda row: {k: row["prompt"] + row[k] for k in ("chosen", "rejected")})
        .remove_columns(["prompt", "completion"])
    )


def prompts():
    return Dataset.from_list([{"prompt": row["prompt"]} for row in rows()])


def length_reward(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def reward_model(offset=0.0, **spline_settings):
    torch.manual_seed(0)
    config = model().get_base_model().config.to_dict()
    base = LlamaForSequenceClassification(LlamaConfig(**config, num_labels=1))
    lora = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, "task_type": "SEQ_CLS"}
    peft_model = get_peft_model(base, LSLoraConfig(**lora, **spline_settings))
    for spline in splines(peft_model):
        spline.values = spline.grid + offset * torch.linspace(-1, 2, len(spline.grid))
    return peft_model


def make(kind, adapted, folder, **more):
    """A trainer of this kind, with the mixin, on its own kind of rows."""
    chat = tokenizer()
    chat.chat_template = CHAT
    classes, own, data = {
        "transformers": ((Trainer, TrainingArguments), {"remove_unused_columns": False}, tokenized),
        "sft": ((SFTTrainer, SFTConfig), {}, rows),
        "dpo": ((DPOTrainer, DPOConfig), {}, lambda: pairs().remove_columns(["completion"])),
        "grpo": ((GRPOTrainer, GRPOConfig), {"num_generations": 4, "max_completion_length": 6}, prompts),
        "reward": ((RewardTrainer, RewardConfig), {}, preferences),
    }[kind]
    trainer_class = type(f"Spline{classes[0].__name__}", (SplineTrainerMixin, classes[0]), {})
    arguments = classes[1](**settings(folder, logging_steps=1, **own, **more))
    extra = {"processing_class": chat}
    if kind == "transformers":
        extra = {"data_collator": DataCollatorForLanguageModeling(chat, mlm=False)}
    if kind == "grpo":
        extra["reward_funcs"] = length_reward
    return trainer_class(adapted, args=arguments, train_dataset=data(), spline_lr=0.02, **extra)


def trained(adapted):
    """The splines of `default`: TRL's DPO adds a frozen copy of it."""
    return [spline for spline in splines(adapted) if spline.weight.requires_grad]


KINDS = ["transformers", "sft", "dpo", "grpo", "reward"]


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_move_the_splines_and_log_them(kind, tmp_path):
    adapted = reward_model() if kind == "reward" else model()
    trainer = make(kind, adapted, tmp_path, optim="adamw_torch", max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
    entries = [entry for entry in trainer.state.log_history if "spline/deviation" in entry]
    assert len(entries) == 2 and all(math.isfinite(e["loss"]) for e in entries)
    assert 0 < entries[0]["spline/deviation"] < entries[1]["spline/deviation"]
    for spline in trained(adapted):
        assert spline.weight.abs().sum() > 0 and spline.weight.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_takes_the_penalty_once(kind, tmp_path):
    """Against the same step without it: `−lr · 2 λ / K · (v_i − k_i)`, whatever the trainer makes of the loss."""
    after = {}
    for weight in (0.0, 3.0):
        create = reward_model if kind == "reward" else model
        adapted = create(offset=0.5, spline_reg_weight=weight)
        before = [spline.weight.detach().clone() for spline in trained(adapted)]
        make(kind, adapted, tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4).train()
        after[weight] = [spline.weight.detach() for spline in trained(adapted)]
    for start, free, pulled in zip(before, after[0.0], after[3.0], strict=True):
        torch.testing.assert_close(pulled - free, -1e-3 * 20 * 2 * 3.0 / 5 * start, rtol=1e-3, atol=1e-6)


def test_the_frozen_copy_of_dpo_has_the_grids_too(tmp_path):
    adapted = model(calibration_steps=1)
    for i, spline in enumerate(splines(adapted)):
        spline.values = spline.grid * 1.5
        spline.calibrate(0.02 * (i + 1))
    ids = torch.arange(12).reshape(2, 6)
    expected = adapted.eval()(ids).logits
    without_grids = copy.deepcopy(adapted)
    make("dpo", adapted, tmp_path)
    adapted.set_adapter("ref")
    assert torch.equal(adapted.eval()(ids).logits, expected)

    asked_at_once = model(calibration_steps=1)
    asked_at_once.load_state_dict(without_grids.state_dict())
    trainer = make("dpo", asked_at_once, tmp_path, precompute_ref_log_probs=True, max_steps=1)
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert loss == pytest.approx(math.log(2), abs=1e-3)  # the reference is the policy before its first step

    arguments = DPOConfig(**settings(tmp_path))
    data = pairs().remove_columns(["completion"])
    DPOTrainer(without_grids, args=arguments, train_dataset=data, processing_class=tokenizer())
    without_grids.set_adapter("ref")
    with pytest.raises(ValueError, match="a spline with learned heights must have its grid_scale"):
        without_grids.eval()(ids)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("placement", ["output", "bottleneck", "weight"])
def test_gradient_checkpointing_changes_no_gradient(placement, reentrant, dtype):
    ids = torch.arange(12).reshape(2, 6) % len(WORDS)
    gradients = []
    for checkpointing in (False, True):
        adapted = model(offset=0.2, placement=placement).train()
        if checkpointing:
            adapted.enable_input_require_grads()
            adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            logits = adapted(ids).logits
        cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
