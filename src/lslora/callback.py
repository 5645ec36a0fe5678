"""A callback that shows a trainer's splines: numbers at every log, pictures now and then, and files for the report.

Trainer(model, ..., callbacks=[SplineCallback()])
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .diagnostics import trained_records
from .failures import endless_waits, unmoved_knots, unstable_slopes
from .files import write_whole
from .plots import plot_deviations, plot_heatmap, plot_splines
from .records import Record, mean_metrics, save_records
from .trackers import Tracker, trackers_of

logger = logging.getLogger(__name__)

COURSE = "spline_course.jsonl"
DIAGNOSTICS = "spline_diagnostics.json"
PICTURES = {"splines": plot_splines, "deviations": plot_deviations, "heatmap": plot_heatmap}


class SplineCallback(TrainerCallback):
    """Shows the trained splines of any `transformers.Trainer`.

    At every log of the loss their averages (`lslora.records.mean_metrics`) go into the log history, and the state
    of every layer into `spline_course.jsonl` in the output folder. Every `picture_steps` steps and at the end of the
    training, pictures go to those of wandb, TensorBoard and trackio that the trainer reports to; at the end, the
    records are saved as `spline_diagnostics.json`. `SplineTrainerMixin` logs the averages as well; together with it
    they are logged once. A calibration that the training is too short for is warned of at once, slopes that explode
    when they first do, knots that never moved at the end.

    Args:
        picture_steps: Optimizer steps from picture to picture, ≥ 1.

    Raises:
        ValueError: `picture_steps` is below 1; or, when the training begins, no spline of the model is trained.
    """

    def __init__(self, picture_steps: int = 100) -> None:
        if picture_steps < 1:
            raise ValueError(f"picture_steps must be at least 1, got {picture_steps}")
        self.picture_steps = picture_steps
        self._trackers: list[Tracker] = []
        self._warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if not trained_records(model):
            raise ValueError("SplineCallback needs a model that trains LS-LoRA splines, found none")
        if state.is_world_process_zero:
            self._trackers = trackers_of(args)
            kept = [entry for entry in load_course(_folder(args)) if entry["step"] <= state.global_step]
            _write_course(_folder(args) / COURSE, kept)
            if warning := endless_waits(model, state.max_steps - state.global_step):
                logger.warning("%s", warning)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        records = trained_records(model)  # every process takes part: each may hold a shard
        if not state.is_world_process_zero:
            return
        with open(_folder(args) / COURSE, "a", encoding="utf-8") as file:
            file.write(_course_line(state.global_step, records))
        if (warning := unstable_slopes(records)) and not self._warned:
            logger.warning("step %d: %s", state.global_step, warning)
            self._warned = True
        metrics = mean_metrics(records)
        if not metrics.keys() <= logs.keys():
            logs.update(metrics)
            state.log_history[-1].update(metrics)
            for tracker in self._trackers:
                tracker.log_numbers(metrics, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step % self.picture_steps and not control.should_training_stop:
            return
        records = trained_records(model)
        # Not on_train_end: the trackers' own callbacks, which come first, close their runs there.
        if state.is_world_process_zero and self._trackers:
            pictures = {f"spline/{name}": plot(records) for name, plot in PICTURES.items()}
            for tracker in self._trackers:
                tracker.log_pictures(pictures, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        records = trained_records(model)  # with `load_best_model_at_end` no longer the last step's
        if state.is_world_process_zero:
            save_records(records, _folder(args) / DIAGNOSTICS)
            if warning := unmoved_knots(records):
                logger.warning("%s", warning)
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []


def load_course(folder: str | Path) -> list[dict[str, Any]]:
    """What `SplineCallback` wrote into an output folder over a training.

    Returns:
        For every log `{"step": step, "layers": {name: [deviation, slope variance]}}`; empty without the file. A last
        line that was cut short is left out.

    Raises:
        ValueError: the file is of another kind.
    """
    path = Path(folder) / COURSE
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    try:
        return [{"step": entry["step"], "layers": entry["layers"]} for entry in map(json.loads, lines)]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a file that SplineCallback wrote: {error!r}") from error


def _course_line(step: int, records: Iterable[Record]) -> str:
    layers = {r["layer"]: [float(f"{r[key]:.6g}") for key in ("deviation", "slope_variance")] for r in records}
    return json.dumps({"step": step, "layers": layers}) + "\n"


def _folder(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir))


def _write_course(path: Path, entries: list[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(entry) + "\n" for entry in entries))
