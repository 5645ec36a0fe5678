"""Checkpoints that are known to be whole: a trainer that is killed goes on from the last of them.

A checkpoint is many files, and a kill may come between any two or within one. The last thing written is therefore a
seal, a list of the files with their checksums; without one that fits, a checkpoint is passed over.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from safetensors import SafetensorError
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .files import sha256, write_whole

SEAL = "whole.json"


class CheckpointError(OSError):
    """A checkpoint that could not be written; the message names it and the reason."""


class WholeCheckpointsMixin:
    """Seals every checkpoint of `transformers.Trainer`, and of every trainer built on it, once it is whole.

    Put it in front of the trainer's class. `last_whole_checkpoint` finds what to resume from. With `save_total_limit`
    older checkpoints are removed when the new one is sealed, so that a kill between the two costs nothing.

    Raises:
        CheckpointError: when a checkpoint cannot be written (the disk is full, say). What was written of it is
            removed; earlier ones stay as they are.
    """

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        arguments, state = self.args, self.state  # type: ignore[attr-defined]
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"  # type: ignore[attr-defined]
        try:
            self._save_without_limit(model, trial)
            PartialState().wait_for_everyone()  # each writes files of its own
            if arguments.should_save:
                torch.save(arguments, folder / TRAINING_ARGS_NAME)  # as they are, with their limit
                seal(folder)
                remove_older(folder, arguments.save_total_limit, best=state.best_model_checkpoint)
        except Exception as error:
            if not is_of_writing(error):
                raise
            free = shutil.disk_usage(arguments.output_dir).free  # torch does not tell
            shutil.rmtree(folder, ignore_errors=True)
            raise CheckpointError(f"{folder} could not be written, with {free} bytes free: {error}") from error

    def _save_without_limit(self, model: Any, trial: Any) -> None:
        """The trainer's own saving, which would remove older checkpoints before this one has its seal."""
        arguments = self.args  # type: ignore[attr-defined]
        limit, arguments.save_total_limit = arguments.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            arguments.save_total_limit = limit

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The trainer's own; an adapter stays in the dtype that it is trained in."""
        with _keeping_dtypes(self.model if model is None else model):  # type: ignore[attr-defined]
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]


@contextmanager
def _keeping_dtypes(model: Any) -> Iterator[None]:
    """peft's `load_adapter` makes half precision fp32, and TRL trains in bf16 on quantised bases.

    A training that goes on with other numbers than it had is another one.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    model.load_adapter = partial(model.load_adapter, autocast_adapter_dtype=False)
    try:
        yield
    finally:
        del model.load_adapter


def is_of_writing(error: Exception) -> bool:
    """Whether it may be of a file that cannot be written: torch's, safetensors' and tokenizers' are no OSError."""
    return isinstance(error, (OSError, RuntimeError, SafetensorError)) or type(error) is Exception


def seal(folder: Path) -> None:
    """Write down what a checkpoint's files are, as the sign that they are all there."""
    write_whole(folder / SEAL, json.dumps({"sha256": _checksums(folder)}, indent=1) + "\n")


def remove_older(saved: Path, limit: int | None, *, best: str | None) -> None:
    """Keep `limit` checkpoints beside and with `saved`, among them the best: the last to be sealed."""
    if limit is None or limit <= 0:  # as transformers counts
        return
    folders = sorted(_by_step(saved.parent), key=_sealed_at, reverse=True)
    kept = {saved, *(folder for folder in folders if best is not None and folder == Path(best))}
    for folder in folders:
        if folder not in kept and len(kept) >= limit:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            kept.add(folder)


def _sealed_at(folder: Path) -> int:
    """When a checkpoint was sealed, in nanoseconds; 0 without a seal."""
    return (folder / SEAL).stat().st_mtime_ns if (folder / SEAL).exists() else 0


def problem_of(folder: Path) -> str | None:
    """Why a checkpoint is not whole; None if it is."""
    try:
        expected = json.loads((folder / SEAL).read_text(encoding="utf-8"))["sha256"]
    except OSError:
        return f"it has no {SEAL}: it was not written to its end, or a new run has begun in its folder since"
    except (ValueError, KeyError, TypeError):
        return f"its {SEAL} is not readable"
    found = _checksums(folder)
    changed = sorted(name for name in expected if found.get(name) != expected[name])
    return f"{', '.join(changed)} missing or changed" if changed else None


def last_whole_checkpoint(output_dir: str | Path) -> tuple[Path | None, list[str]]:
    """Find what a training can go on from.

    Returns:
        The checkpoint of the latest step that is whole, or None; and for every later one why it is not.
    """
    problems: list[str] = []
    for folder in _by_step(Path(output_dir)):
        problem = problem_of(folder)
        if problem is None:
            return folder, problems
        problems.append(f"{folder}: {problem}")
    return None, problems


def last_sealed_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint of the latest step that was written to its end; what has become of it since is not looked at."""
    return next(filter(_sealed_at, _by_step(Path(output_dir))), None)


def unseal(output_dir: str | Path) -> int:
    """Let nothing be resumed from the checkpoints in `output_dir`, as a new run there begins; how many there were."""
    seals = [folder / SEAL for folder in filter(_sealed_at, _by_step(Path(output_dir)))]
    for path in seals:
        path.unlink()
    return len(seals)


def _by_step(output_dir: Path) -> list[Path]:
    """All checkpoints, the latest step first."""
    steps = {}
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = folder.name.rpartition("-")[2]
        if number.isdecimal() and folder.is_dir():
            steps[folder] = int(number)
    return sorted(steps, key=steps.__getitem__, reverse=True)


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path in the folder."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SEAL and not path.name.startswith("."):  # nor a seal that was not finished
            sums[path.relative_to(folder).as_posix()] = sha256(path)
    return sums
