"""Losses and gradients that are no numbers stop a training before its weights; ill splines are told."""

import logging
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import Trainer, TrainingArguments

from lslora import LSLoraConfig
from lslora.callback import SplineCallback
from lslora.diagnostics import spline_records
from lslora.failures import all_finite, failure, unmoved_knots, unstable_slopes
from lslora.spline import splines_of
from lslora.training import SplineTrainerMixin
from tests.tiny import make_tiny

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_lslora


class Net(nn.Module):
    """Two layers, something that can break, and a third layer."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.between = between

    def forward(self, x, y):
        return {"loss": (self.third(self.between(self.second(self.first(x)))) - y).square().mean()}


class Spikes(nn.Module):
    """√|x| at 0 has a gradient that is not finite, and a value that is."""

    def forward(self, x):
        return (x * 0).abs().sqrt() + x


class SplineTrainer(SplineTrainerMixin, Trainer):
    pass


def made(folder, rows, between=None, config=None, callbacks=(), **more):
    torch.manual_seed(0)
    config = config or LSLoraConfig(r=2, target_modules=["first", "second"])
    model = get_peft_model(Net(between or nn.Identity()), config)
    arguments = TrainingArguments(
        str(folder), max_steps=len(rows), per_device_train_batch_size=1, use_cpu=True, report_to="none",
        disable_tqdm=True, save_steps=1, logging_steps=1, learning_rate=1e-2,
        train_sampling_strategy="sequential", **more,
    )  # fmt: skip
    return SplineTrainer(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks))


def rows_with(bad=None, count=4):
    rows = [{"x": torch.ones(4), "y": torch.ones(1)} for _ in range(count)]
    if bad is not None:
        rows[2] = {"x": bad, "y": torch.ones(1)}
    return rows


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


@pytest.mark.parametrize("method", [LSLoraConfig, LoraConfig])
def test_a_loss_that_is_no_number_names_step_and_layer_and_moves_nothing(tmp_path, method):
    config = method(r=2, target_modules=["first", "second"])
    trainer = made(tmp_path, rows_with(torch.tensor([1.0, float("nan"), 1.0, 1.0])), config=config)
    before = []
    hook = register_optimizer_step_post_hook(lambda *_: before.append(weights(trainer)))
    with pytest.raises(FloatingPointError, match=r"step 3: the loss is nan, not finite; it begins in first, one of 2"):
        trainer.train()
    hook.remove()
    assert len(before) == 2
    assert all(torch.equal(now, then) for now, then in zip(weights(trainer), before[-1], strict=True))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


class OwnLoss(SplineTrainer):
    """Makes a loss of its own of a batch that is not what the model takes."""

    def compute_loss(self, model, inputs, **kwargs):
        return super().compute_loss(model, {"x": inputs["x"], "y": inputs["y"].float()}, **kwargs) * float("nan")


def test_a_batch_that_is_not_what_the_model_takes_hides_nothing(tmp_path):
    trainer = made(tmp_path, rows_with())
    trainer.__class__ = OwnLoss
    with pytest.raises(FloatingPointError, match="step 1: the loss is nan, not finite. The step was not taken"):
        trainer.train()
    for inputs in ([{"prompt": "x"}], {"x": torch.ones(3)}):
        error = failure(trainer.model, inputs, torch.tensor(float("nan")), 7)
        assert str(error).startswith("step 7: the loss is nan, not finite. ")


@pytest.mark.parametrize(("method", "more"), [(LSLoraConfig, ", or a smaller spline_lr"), (LoraConfig, "")])
def test_a_remedy_for_splines_is_told_where_there_are_any(method, more):
    model = get_peft_model(Net(nn.Identity()), method(r=2, target_modules=["first"]))
    error = failure(model, {}, torch.tensor(float("nan")), 1)
    assert str(error).endswith(f"Start anew with a smaller learning rate{more}")


def test_the_spline_s_state_is_told(tmp_path):
    trainer = made(tmp_path, rows_with(torch.full((4,), float("inf"))))
    with pytest.raises(FloatingPointError, match="its spline has the heights -3, -1.5.* slope variance of .*scale 1"):
        trainer.train()


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_no_number_names_the_layer_nearest_to_it(tmp_path, clip):
    trainer = made(tmp_path, rows_with(), Spikes(), max_grad_norm=clip)
    with pytest.raises(FloatingPointError, match="step 1: a gradient is not finite; it begins in second, one of 2"):
        trainer.train()


def test_no_gradient_and_any_dtype():
    assert all_finite(torch.tensor(1.0), [])
    assert not all_finite(torch.tensor(float("inf")), [])
    assert all_finite(torch.tensor(1.0), [torch.ones(3), torch.ones(2, dtype=torch.bfloat16)])
    assert not all_finite(torch.tensor(1.0), [torch.ones(3), torch.tensor([1.0, float("-inf")])])


def test_gradient_accumulation_is_looked_at_where_it_ends(tmp_path):
    trainer = made(tmp_path, rows_with(torch.full((4,), float("nan"))), gradient_accumulation_steps=2)
    with pytest.raises(FloatingPointError, match="step 2: the loss is nan"):
        trainer.train()


def test_warnings_name_the_worst_layer_and_a_remedy(tmp_path, caplog):
    trainer = made(tmp_path, rows_with(), callbacks=[SplineCallback()])
    first = trainer.model.base_model.model.first.lora_spline["default"]
    first.values = [-3.0, 4.0, -4.0, 4.0, 3.0]
    records = spline_records(trainer.model)
    assert unstable_slopes(records[1:]) is None
    assert unstable_slopes(records).startswith("the slopes of 1 of 2 splines vary by more than 1, most in first (")
    assert unmoved_knots(records).startswith("7 of 10 knots have not moved, most in second (5)")
    with caplog.at_level(logging.WARNING, "lslora"):
        trainer.train()
    told = [record.getMessage() for record in caplog.records if record.name == "lslora.callback"]
    assert [message.partition(" splines")[0] for message in told if "slopes" in message] == [
        "step 1: the slopes of 1 of 2"
    ]
    assert sum("knots have not moved" in message for message in told) == 1


@pytest.mark.parametrize(("steps", "waited", "is_told"), [(5, 0, False), (4, 0, True), (4, 1, False), (3, 1, True)])
def test_a_training_too_short_for_its_calibration_is_told_when_it_begins(tmp_path, caplog, steps, waited, is_told):
    config = LSLoraConfig(r=2, target_modules=["first", "second"], calibration_steps=4)
    trainer = made(tmp_path, rows_with(count=steps), config=config, callbacks=[SplineCallback()])
    for spline in splines_of(trainer.model):
        spline.steps_waited = waited
    with caplog.at_level(logging.WARNING, "lslora"):
        trainer.train()
    told = f"{steps} optimizer steps are to come, and grids are measured in the last of {4 - waited}"
    assert [text.partition(" (")[0] for text in caplog.messages if "to come" in text] == [told] * is_told


@pytest.mark.parametrize(("calibration_steps", "told"), [(4, "1 optimizer steps are to come, and grids"), (0, None)])
def test_a_training_that_goes_on_is_told_of_the_steps_that_are_left(tmp_path, caplog, calibration_steps, told):
    config = LSLoraConfig(r=2, target_modules=["first", "second"], calibration_steps=calibration_steps)
    made(tmp_path, rows_with(count=3), config=config, callbacks=[SplineCallback()]).train()
    caplog.clear()
    longer = made(tmp_path, rows_with(count=4 if told else 3), config=config, callbacks=[SplineCallback()])
    with caplog.at_level(logging.WARNING, "lslora"):
        longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    told_now = [text for text in caplog.messages if "to come" in text]
    assert told_now[0].startswith(told) if told else told_now == []


def test_a_calibration_that_is_not_over_is_told(tmp_path, caplog):
    config = LSLoraConfig(r=2, target_modules=["first", "second"], calibration_steps=100)
    trainer = made(tmp_path, rows_with(), config=config, callbacks=[SplineCallback()])
    with caplog.at_level(logging.WARNING, "lslora"):
        trainer.train()
    assert caplog.messages == [message for message in caplog.messages if "knots have not moved" not in message]
    assert any(
        "2 of 2 splines still wait for their grid, the first in first: they" in text for text in caplog.messages
    )


def test_a_run_that_breaks_says_so_and_keeps_its_checkpoints(tmp_path, capsys):
    make_tiny(tmp_path)
    arguments = ["--model_name", tmp_path / "model", "--dataset_path", tmp_path / "train.jsonl", "--r", 2]
    arguments += ["--output_dir", tmp_path / "out", "--max_steps", 30, "--save_steps", 1, "--learning_rate", 1e30]
    assert train_lslora.main([str(argument) for argument in arguments]) == 1
    told = capsys.readouterr().err
    assert "error: " in told and "not finite" in told and "Start anew with a smaller learning rate" in told
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
