"""One run: a method, rank, learning rate and seed on a model and its data → a record of what happened."""

from __future__ import annotations

import math
import platform
import subprocess
import tempfile
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from lslora.diagnostics import observe_occupancy, spline_records
from lslora.embedded import resolve_model_name
from lslora.training import SplineTrainerMixin

from .forms import separate_form_group
from .methods import attach
from .tasks import Example, Prefix, candidates, collate, completion_logits, evaluate, load_examples

STEPS_BETWEEN = 5  # of the states that are measured
PACKAGES = ("lslora", "peft", "torch", "transformers")


@dataclass(frozen=True)
class Setting:
    """What all runs of a plan share.

    Args:
        model: `smollm2`, a hub id, or a folder in the data's folder.
        train: Rows to train on, see `lslora.data.load_rows`.
        validation: Rows to measure.
        first_layer: Layers below it are not adapted.
        max_tokens: Longer rows are left out, prompt and completion together.
        train_rows: At most so many, spread evenly over the file.
        validation_rows: At most so many, spread evenly over the file.
        steps: Optimizer steps.
        batch_size: Rows a step.
        warmup_steps: Steps over which the learning rate rises.
        schedule: What it does afterwards, by transformers' name; by default it falls linearly to 0.
        states: What is measured is the mean over so many states, five steps apart, the last at the training's end.
        max_grad_norm: Gradients are clipped to this norm.
        matmul_precision: How a GPU multiplies fp32 matrices, by torch's name: `high` is TF32.
        cloze: Questions are asked without their numbered answers and answered with the text of one.
        retained: Rows of another kind, asked as with `cloze`, which show what training leaves of what the model knew.
        retained_rows: At most so many, spread evenly over the file.

    Raises:
        ValueError: a training of `steps` does not have that many states, five steps apart.
    """

    model: str
    train: str
    validation: str
    first_layer: int = 0
    max_tokens: int = 128
    train_rows: int | None = None
    validation_rows: int | None = None
    steps: int = 60
    batch_size: int = 8
    warmup_steps: int = 4
    schedule: str = "linear"
    states: int = 1
    max_grad_norm: float = 1.0
    matmul_precision: str = "highest"
    cloze: bool = False
    retained: str | None = None
    retained_rows: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.states <= 1 + (self.steps - 1) // STEPS_BETWEEN:
            raise ValueError(
                f"states must be at least 1, the first of them after a step: {self.states} states {STEPS_BETWEEN} "
                f"steps apart do not fit into {self.steps} steps"
            )


@dataclass(frozen=True)
class Run:
    """One cell of a plan: `method` is what `benchmarks.methods.attach` reads, `name` its name in the plan."""

    name: str
    method: dict[str, Any] = field(hash=False)
    r: int
    lr: float
    seed: int

    @property
    def id(self) -> str:
        return f"{self.name}-r{self.r}-lr{self.lr:g}-seed{self.seed}"


def model_name(setting: Setting, data: Path) -> str:
    """What `from_pretrained` loads: a folder in the data's folder, or what `resolve_model_name` makes of the name."""
    local = data / setting.model
    return str(local) if local.is_dir() else resolve_model_name(setting.model)


class Bench:
    """A model and its rows, loaded once for any number of runs."""

    def __init__(self, setting: Setting, data: Path) -> None:
        self.setting, self.commit = setting, commit()
        torch.set_float32_matmul_precision(setting.matmul_precision)
        name = model_name(setting, data)
        self.device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
        rows = partial(load_examples, tokenizer=tokenizer, max_tokens=setting.max_tokens)
        self.train = rows(data / setting.train, max_rows=setting.train_rows, cloze=setting.cloze)
        self.measured = {
            "validation": rows(data / setting.validation, max_rows=setting.validation_rows, cloze=setting.cloze)
        }
        if setting.retained:
            self.measured["retained"] = rows(data / setting.retained, max_rows=setting.retained_rows, cloze=True)
        if setting.first_layer:
            prefix = Prefix(self.model, setting.first_layer, Path(setting.model).name)
            prefix.attach_states(self.train)
            for examples in self.measured.values():
                prefix.attach_states([candidate for row in examples for candidate in candidates(row)])

    def measure(self, run: Run) -> dict[str, Any]:
        """Train and evaluate; see the README of benchmarks/ for the record's fields."""
        set_seed(run.seed)
        model = attach(deepcopy(self.model).to(self.device), run.method, run.r)  # type: ignore[arg-type]
        started = time.monotonic()
        states = Measuring(self.measured["validation"], self.setting)
        losses = train(model, run, self.setting, self.train, [states]) if run.method["kind"] != "none" else []
        seconds = time.monotonic() - started
        record = {
            "run": {"name": run.name, "method": run.method, "r": run.r, "lr": run.lr, "seed": run.seed},
            "setting": vars(self.setting),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "losses": losses,
            "diverged": not all(map(math.isfinite, losses)),
            "train_seconds": seconds,
            "machine": f"{self.device}, {torch.get_num_threads()} threads",
            "python": platform.python_version(),
            "versions": {package: version(package) for package in PACKAGES},
            "commit": self.commit,
        }
        if not record["diverged"]:
            with observe_occupancy(model) as occupancy:
                record["validation"] = mean_of([*states.found, evaluate(model, self.measured["validation"])])
            if "retained" in self.measured:
                record["retained"] = evaluate(model, self.measured["retained"])
            if run.method["kind"] == "lslora":
                record["splines"] = spline_records(model, occupancy=occupancy)
        return record


def mean_of(states: list[dict[str, Any]]) -> dict[str, Any]:
    """What `evaluate` found in several states of a model → their mean, number for number."""
    if len(states) == 1:
        return states[0]
    return {name: np.mean([found[name] for found in states], axis=0).tolist() for name in states[0]}


class CompletionTrainer(SplineTrainerMixin, Trainer):
    """transformers' Trainer on the tensors of `benchmarks.tasks`.

    With `spline_hold` the splines' learning rate does not fall before that share of the steps, and then to 0.
    """

    def __init__(self, *args: Any, spline_hold: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spline_hold = spline_hold

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        separate_form_group(optimizer, self.model, self.spline_lr)  # type: ignore[arg-type]
        return optimizer

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        scheduler: Any = super().create_scheduler(num_training_steps, *args, **kwargs)
        if self.spline_hold is not None:
            warmup, falls = max(1, self.args.warmup_steps), (1 - self.spline_hold) * num_training_steps
            # The last group is the splines'.
            scheduler.lr_lambdas[-1] = lambda step: min(step / warmup, 1, (num_training_steps - step) / falls)
        return scheduler

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return cross_entropy(*completion_logits(model, inputs))


class Measuring(TrainerCallback):
    """Measures rows in the states of a training that come before the last, as the setting has it."""

    def __init__(self, examples: list[Example], setting: Setting) -> None:
        self.examples = examples
        self.found: list[dict[str, Any]] = []
        self.steps = [setting.steps - STEPS_BETWEEN * i for i in range(1, setting.states)]

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.found.append(evaluate(model, self.examples))


def train(
    model: Any, run: Run, setting: Setting, examples: list[Example], callbacks: Sequence[TrainerCallback] = ()
) -> list[float]:
    """The loss of every step, in nats per completion token."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = CompletionTrainer(
            model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=setting.steps,
                per_device_train_batch_size=setting.batch_size,
                learning_rate=run.lr,
                lr_scheduler_type=setting.schedule,
                warmup_steps=setting.warmup_steps,
                max_grad_norm=setting.max_grad_norm,
                optim="adamw_torch",
                weight_decay=0.0,
                seed=run.seed,
                logging_steps=1,
                logging_nan_inf_filter=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                use_cpu=not torch.accelerator.is_available(),
            ),
            train_dataset=examples,
            data_collator=collate,
            callbacks=[*callbacks],
            spline_lr=spline_lr(run),
            spline_hold=run.method.get("spline_hold"),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def spline_lr(run: Run) -> float:
    """The splines' learning rate; a method gives it, or as `spline_lr_ratio` its multiple of that of A and B."""
    if "spline_lr" not in run.method:
        return run.method.get("spline_lr_ratio", 1.0) * run.lr
    if "spline_lr_ratio" in run.method:
        raise ValueError(f"{run.name} must have spline_lr or spline_lr_ratio, got both")
    return run.method["spline_lr"]


def commit() -> str:
    """The commit the code is at, marked where files differ from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.strip()
