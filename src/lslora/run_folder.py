"""The output folder of a run: `run.json`, whether a run may begin there or go on, and that no other is at it.

`run.json` holds what the run was told (`settings`), what ran it (`versions`) and, at the end, how the model answered.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import Timeout

from .checkpoints import last_whole_checkpoint
from .files import lock_file, unlock_file, write_whole

RUN = "run.json"
STATE = "trainer_state.json"
PACKAGES = ("lslora", "peft", "torch", "transformers", "trl")
NEEDED = {"method", "model_name", "dataset_path"}


@contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """Keep other runs out of an output folder: both would write the same files. Of several processes the first does.

    Raises:
        ValueError: another run is in it.
    """
    folder = Path(folder)
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    is_new, lock = not folder.exists(), None
    # Where a folder cannot be written, or its file system has no locks, the run itself says what there is to say.
    with suppress(OSError, NotImplementedError):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = lock_file(folder / ".lock")
        except Timeout as error:
            raise ValueError(f"another run is writing {folder}: wait for it or choose another output_dir") from error
    try:
        yield
    finally:
        if lock is not None:
            unlock_file(lock)
        if is_new:
            with suppress(OSError):
                folder.rmdir()  # of a run that was refused


def write_run(folder: str | Path, settings: Mapping[str, Any], evaluation: Mapping[str, Any]) -> None:
    """Write `run.json`, whole or not at all, with the versions of what is installed."""
    versions = {package: version(package) for package in PACKAGES}
    run = {"settings": settings, "versions": versions, **evaluation}
    write_whole(Path(folder, RUN), json.dumps(run, indent=1) + "\n")


def read_run(folder: str | Path) -> dict[str, Any]:
    """What `write_run` wrote.

    Raises:
        ValueError: the file holds something else; the message names it.
        OSError: it cannot be read.
    """
    path = Path(folder, RUN)
    run = read_json_object(path)
    settings, versions = run.get("settings"), run.get("versions")
    if not (isinstance(settings, dict) and settings.keys() >= NEEDED and isinstance(versions, dict)):
        raise ValueError(f"{path} must be a file that train_lslora.py wrote, with settings and versions")
    return run


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError, which names the file, for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON in UTF-8: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def earlier_settings(folder: str | Path) -> dict[str, Any]:
    """Those of the run that was here before; none where there is no file of them, or none that can be read."""
    try:
        return read_run(folder)["settings"]
    except (OSError, ValueError):
        return {}


def earlier_evaluation(folder: str | Path) -> dict[str, Any]:
    """How the model of the run that was here before answered; nothing where `earlier_settings` has nothing."""
    try:
        return {name: found for name, found in read_run(folder).items() if name not in ("settings", "versions")}
    except (OSError, ValueError):
        return {}


def missing_to_resume(folder: str | Path, settings: Mapping[str, Any], may_change: Collection[str]) -> list[str]:
    """What a run must have left in the folder for one with these settings to go on: what there is not, in words.

    That is a whole checkpoint of no more steps than `settings["max_steps"]`, and the same settings, but for those in
    `may_change`, where `run.json` is there: a checkpoint may have come here without it.
    """
    checkpoint, problems = last_whole_checkpoint(folder)
    if checkpoint is None:
        return [f"a checkpoint in {folder} that is whole, to --resume from", *problems]
    if (done := steps_of(checkpoint)) > settings["max_steps"]:
        return [f"--max_steps of at least {done}, which {checkpoint} has behind it; got {settings['max_steps']}"]
    if not Path(folder, RUN).exists():
        return []
    try:
        before = read_run(folder)["settings"]
    except (OSError, ValueError) as error:
        return [f"the settings of the run to --resume: {error}"]
    different = [
        f"{name} was {value!r} and is {settings.get(name)!r}"
        for name, value in before.items()
        if name not in may_change and value != settings.get(name)
    ]
    return [f"the settings of the run to --resume: {'; '.join(different)}"] if different else []


def missing_to_begin(folder: str | Path) -> list[str]:
    """As `missing_to_resume` for a new run: one that was stopped must not be lost because --resume was forgotten."""
    checkpoint, _ = last_whole_checkpoint(folder)
    if checkpoint is None or finished_steps(Path(folder, STATE)) >= steps_of(checkpoint):
        return []
    return [f"an --output_dir without a run that was stopped: go on from {checkpoint} with --resume, or remove it"]


def finished_steps(state: Path) -> int:
    """The steps of a run that was finished, by its log; 0 without one."""
    try:
        return int(read_json_object(state)["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def steps_of(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint has behind it."""
    return int(checkpoint.name.rpartition("-")[2])
