"""Files that are there whole or not at all: written beside their place first, then renamed into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a path to write a file to; at the end that file takes the place of `path`, in one step.

    Whatever ends the writing early, a kill included, leaves what was at `path` as it was.

    Args:
        path: The file; folders above it are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")  # the suffix tells some writers the format
    try:
        yield part
        _sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str) -> None:
    """Write a UTF-8 file as `replacing` does."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def publish(stage: Path, folder: Path) -> None:
    """Move all files of `stage` into `folder`, each in one step, and remove `stage`."""
    files = [path for path in sorted(stage.rglob("*")) if path.is_file()]
    for path in files:
        _sync(path)
    for path in files:
        target = folder / path.relative_to(stage)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    for path in sorted((path for path in stage.rglob("*")), reverse=True):
        path.rmdir()
    stage.rmdir()


def _sync(path: Path) -> None:
    """Have the file's content on the disk before its name is."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
