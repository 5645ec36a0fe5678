"""transformers' Trainer under DeepSpeed, one process on CPU, against itself without; two processes are in
test_several_processes.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import model, settings, tokenized, tokenizer
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from lslora import LSLoraConfig, Spline, spline_penalty
from lslora.callback import SplineCallback, load_course
from lslora.training import SplineTrainerMixin, prepare_for_deepspeed

STEPS = 3
ONE_PROCESS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}


class SplineTrainer(SplineTrainerMixin, Trainer):
    pass


def train(folder, deepspeed=None):
    """Three steps of two micro-batches with a strong penalty and a calibration; the losses and the saved adapter."""
    adapted = model(spline_reg_weight=5.0, calibration_steps=1)
    more = {"deepspeed": deepspeed, "use_cpu": False} if deepspeed else {}
    arguments = settings(folder, 2, learning_rate=0.05, max_steps=STEPS, logging_steps=1, max_grad_norm=0.0, **more)
    trainer = SplineTrainer(
        adapted,
        args=TrainingArguments(**arguments),
        train_dataset=tokenized(),
        data_collator=DataCollatorForLanguageModeling(tokenizer(), mlm=False),
        spline_lr=0.15,
        callbacks=[SplineCallback()],
    )
    trainer.train()
    trainer.save_model()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def configuration(stage, **more):
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        **more,
    }


def train_apart(folder, config):
    """`train` in a process of its own: DeepSpeed keeps state for good."""
    command = [sys.executable, __file__, str(folder), json.dumps(config)]
    return subprocess.run(command, env=os.environ | ONE_PROCESS, capture_output=True, text=True)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_trainer_under_deepspeed_does_what_it_does_without(stage, tmp_path):
    expected = train(tmp_path / "plain")
    done = train_apart(tmp_path / "zero", configuration(stage))
    assert not done.returncode, done.stderr[-3000:]
    found = json.loads((tmp_path / "zero" / "log.json").read_text())
    for key in ("loss", "spline/deviation", "spline/slope_variance", "spline/input_scale", "learning_rate"):
        assert [entry[key] for entry in found] == pytest.approx([entry[key] for entry in expected], abs=1e-5), key
    courses = [load_course(tmp_path / name) for name in ("zero", "plain")]
    for ours, theirs in zip(*courses, strict=True):
        assert ours["step"] == theirs["step"] and ours["layers"].keys() == theirs["layers"].keys()
        for layer, numbers in ours["layers"].items():
            assert numbers == pytest.approx(theirs["layers"][layer], abs=1e-5)
    saved, plain = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("zero", "plain"))
    torch.testing.assert_close(saved, plain, atol=1e-6, rtol=1e-4)
    assert all(tensor > 0 for name, tensor in saved.items() if name.endswith("grid_scale"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, "must have no optimizer"),
        ({"fp16": {"enabled": True}}, "supports bf16 and fp32"),
    ],
)
def test_what_would_step_splines_otherwise_is_refused(config, message, tmp_path):
    done = train_apart(tmp_path, configuration(2, **config))
    assert done.returncode
    assert message in done.stderr


def test_backward_passes_share_the_penalty():
    torch.manual_seed(0)
    spline = Spline(LSLoraConfig(spline_reg_weight=0.7, calibration_steps=1))
    spline.values = spline.grid + torch.randn(5)
    spline.calibrate(6.0)
    z = torch.randn(3, 40)
    for part in z:
        spline(part).mean().backward()
    without = spline.weight.grad.clone()
    spline.weight.grad = None
    prepare_for_deepspeed(spline, gradient_accumulation_steps=3)
    for part in z:
        spline(part).mean().backward()
    (expected,) = torch.autograd.grad(spline_penalty(spline), spline.weight)
    assert expected.abs().min() > 0.01
    torch.testing.assert_close(spline.weight.grad - without, expected)
    torch.optim.SGD(spline.parameters(), lr=0.0).step()  # adds nothing more
    torch.testing.assert_close(spline.weight.grad - without, expected)


def test_a_share_of_no_passes_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        prepare_for_deepspeed(model(), gradient_accumulation_steps=0)


def test_deepspeed_unprepared_is_refused_where_something_would_be_lost():
    spline = Spline(LSLoraConfig())
    spline.weight._hp_mapping = None  # as DeepSpeed's ZeRO-1 and 2 leave it
    with pytest.raises(ValueError, match="prepare_for_deepspeed"):
        spline(torch.randn(4))
    spline.eval()(torch.randn(4))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    log = train(folder, json.loads(sys.argv[2]))
    (folder / "log.json").write_text(json.dumps(log))
