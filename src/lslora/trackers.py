"""Numbers and pictures for the trackers that a trainer reports to: TensorBoard, wandb, trackio."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import TrainingArguments


class Tracker(Protocol):
    """Where a training is followed."""

    def log_numbers(self, numbers: dict[str, float], step: int) -> None: ...

    def log_pictures(self, pictures: dict[str, Figure], step: int) -> None: ...

    def close(self) -> None: ...


def trackers_of(args: TrainingArguments) -> list[Tracker]:
    """Those of the three that are in `args.report_to`; the trainer's own callbacks have begun their runs by then."""
    names = args.report_to or ()
    found: list[Tracker] = [CurrentRun(name) for name in ("wandb", "trackio") if name in names]
    if "tensorboard" in names:
        found.append(TensorBoardRun(args))
    return found


class TensorBoardRun:
    """A run `splines` in the folder of the trainer's own, whose writer nobody else can have."""

    def __init__(self, args: TrainingArguments) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or f"{args.output_dir}/runs").expanduser()
        self.writer = SummaryWriter(log_dir=str(folder / "splines"))

    def log_numbers(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(f"train/{name}", value, step)

    def log_pictures(self, pictures: dict[str, Figure], step: int) -> None:
        for name, figure in pictures.items():
            self.writer.add_image(name, _pixels(figure), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class CurrentRun:
    """The run that the trainer's callback has begun in `wandb` or `trackio`, two modules with the same calls."""

    def __init__(self, module: str) -> None:
        self.module: Any = import_module(module)

    def log_numbers(self, numbers: dict[str, float], step: int) -> None:
        self.module.log({f"train/{name}": value for name, value in numbers.items()} | {"train/global_step": step})

    def log_pictures(self, pictures: dict[str, Figure], step: int) -> None:
        images = {name: self.module.Image(_pixels(figure)) for name, figure in pictures.items()}
        self.module.log({**images, "train/global_step": step})

    def close(self) -> None:
        """The trainer's callback does it."""


def _pixels(figure: Figure) -> np.ndarray:
    """The picture as RGB, uint8 (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
