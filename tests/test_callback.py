"""The callback in real trainers: what it logs, what it writes, and what the trackers hold afterwards."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lslora import LSLoraConfig
from lslora.callback import COURSE, DIAGNOSTICS, SplineCallback, load_course
from lslora.diagnostics import spline_metrics, trained_records
from lslora.records import load_records, spline_table
from lslora.training import SplineTrainerMixin

ROWS = [{"input_ids": torch.arange(i, i + 6), "labels": torch.arange(i, i + 6)} for i in range(8)]


class SplineTrainer(SplineTrainerMixin, Trainer):
    pass


def make_model(method=LSLoraConfig):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1)
    adapter = method(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config), adapter)


def make_trainer(folder, *, trainer=Trainer, steps=5, callback=None, model=None, **settings):
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, learning_rate=0.05, logging_steps=1, save_steps=2, use_cpu=True,
        disable_tqdm=True, **{"report_to": "none", **settings},
    )  # fmt: skip
    return trainer(
        model or make_model(), args, train_dataset=ROWS, eval_dataset=ROWS,
        callbacks=[callback or SplineCallback(picture_steps=2)],
    )  # fmt: skip


@pytest.mark.parametrize("trainer", [Trainer, SplineTrainer])
def test_log_course_and_records(tmp_path, trainer):
    made = make_trainer(tmp_path, trainer=trainer)
    made.train()
    log = [entry for entry in made.state.log_history if "loss" in entry]
    course = load_course(tmp_path)
    assert [entry["step"] for entry in log] == [entry["step"] for entry in course] == [1, 2, 3, 4, 5]
    for entry, logged in zip(course, log, strict=True):
        deviations = [deviation for deviation, _ in entry["layers"].values()]
        assert len(deviations) == 4
        assert logged["spline/deviation"] == pytest.approx(sum(deviations) / 4, rel=1e-5)
        assert logged["spline/deviation"] > 0
    assert log[-1].items() >= spline_metrics(made.model).items()
    assert spline_table(load_records(tmp_path / DIAGNOSTICS)).row_count == 5  # what was not observed is told so
    assert [r["values"] for r in load_records(tmp_path / DIAGNOSTICS)] == [
        r["values"] for r in trained_records(made.model)
    ]


def test_a_resumed_training_goes_on_with_the_course(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    make_trainer(whole).train()
    make_trainer(cut).train()
    with (cut / COURSE).open("a") as file:
        file.write('{"step": 6, "lay')
    made = make_trainer(cut)
    made.train(resume_from_checkpoint=str(cut / "checkpoint-2"))
    assert [entry["step"] for entry in load_course(cut)] == [1, 2, 3, 4, 5]
    assert load_course(cut) == load_course(whole)


def events_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


PICTURES = {"spline/splines", "spline/deviations", "spline/heatmap"}


def test_tensorboard_holds_numbers_and_pictures(tmp_path):
    made = make_trainer(tmp_path, report_to="tensorboard")
    made.train()
    events = events_of(tmp_path / "runs" / "splines")
    assert set(events.Tags()["images"]) == PICTURES
    assert [image.step for image in events.Images("spline/splines")] == [2, 4, 5]
    assert all(image.encoded_image_string.startswith(b"\x89PNG") for image in events.Images("spline/heatmap"))
    logged = [entry["spline/deviation"] for entry in made.state.log_history if "loss" in entry]
    assert [scalar.value for scalar in events.Scalars("train/spline/deviation")] == pytest.approx(logged)


def test_numbers_that_the_trainer_logs_are_not_logged_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "boards"))
    make_trainer(tmp_path, trainer=SplineTrainer, report_to="tensorboard").train()
    events = events_of(tmp_path / "boards" / "splines")
    assert set(events.Tags()["images"]) == PICTURES and not events.Tags()["scalars"]


def test_wandb_holds_numbers_and_pictures(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.finish()  # a run that an earlier test left open
    wandb.teardown()  # and the folder it was in
    made = make_trainer(tmp_path, report_to="wandb")
    made.train()
    summary = dict(wandb.run.summary)
    wandb.finish()
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    assert summary["train/spline/deviation"] == pytest.approx(logged[-1]["spline/deviation"])
    (media,) = tmp_path.glob("wandb/offline-run-*/files/media/images/spline")
    found = [path.name.split("_")[0] for path in media.glob("*.png")]
    assert {f"spline/{name}" for name in found} == PICTURES and len(found) == 9


def test_trackio_holds_numbers_and_pictures(tmp_path):
    """In a process of its own: where trackio writes is settled when it is imported."""
    pytest.importorskip("trackio")
    code = "import sys; from tests.test_callback import make_trainer; "
    code += "make_trainer(sys.argv[1], report_to='trackio', project='splines', steps=2).train()"
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, check=True, capture_output=True)
    with closing(sqlite3.connect(tmp_path / "splines.db")) as database:
        entries = [json.loads(text) for (text,) in database.execute("select metrics from metrics")]
    deviations = [entry["train/spline/deviation"] for entry in entries if "train/spline/deviation" in entry]
    course = load_course(tmp_path / "out")
    assert deviations == pytest.approx([sum(d for d, _ in e["layers"].values()) / 4 for e in course], rel=1e-5)
    (pictures,) = (entry for entry in entries if "spline/splines" in entry)
    assert pictures.keys() == PICTURES | {"train/global_step"} and pictures["train/global_step"] == 2
    for name in PICTURES:
        path = tmp_path / "media" / pictures[name]["file_path"]
        assert path.read_bytes().startswith(b"\x89PNG")


class StopAt(TrainerCallback):
    """Stops when SplineCallback has seen the step, as early stopping does in an evaluation."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 2


def test_a_training_that_an_evaluation_stops_has_its_records_too(tmp_path):
    trainer = make_trainer(tmp_path, steps=5)
    trainer.add_callback(StopAt())
    trainer.train()
    assert trainer.state.global_step == 2
    now = [record["deviation"] for record in trained_records(trainer.model)]
    assert [record["deviation"] for record in load_records(tmp_path / DIAGNOSTICS)] == pytest.approx(now)


def test_records_are_of_the_best_model_where_that_is_loaded_at_the_end(tmp_path):
    made = make_trainer(
        tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="spline/deviation", greater_is_better=False,
    )  # fmt: skip
    made.compute_metrics = lambda _: {"spline/deviation": spline_metrics(made.model)["spline/deviation"]}
    made.train()
    best = int(made.state.best_model_checkpoint.rpartition("-")[2])
    course = {entry["step"]: entry["layers"] for entry in load_course(tmp_path)}
    found = {r["layer"]: [r["deviation"], r["slope_variance"]] for r in load_records(tmp_path / DIAGNOSTICS)}
    assert best < 5 and all(found[name] == pytest.approx(state, rel=1e-5) for name, state in course[best].items())
    assert not any(found[name] == pytest.approx(state, rel=1e-5) for name, state in course[5].items())


def test_models_without_splines_are_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a model that trains LS-LoRA splines, found none"):
        make_trainer(tmp_path, model=make_model(LoraConfig)).train()
    with pytest.raises(ValueError, match="picture_steps must be at least 1, got 0"):
        SplineCallback(picture_steps=0)


@pytest.mark.parametrize("line", ["[]", '{"step": 1}', "no JSON"])
def test_other_files_are_no_course(tmp_path, line):
    (tmp_path / COURSE).write_text(f"{json.dumps({'step': 1, 'layers': {}})}\n{line}\n")
    with pytest.raises(ValueError, match=f"{COURSE} must be a file that SplineCallback wrote"):
        load_course(tmp_path)
