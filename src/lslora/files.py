"""Files that are there whole or not at all, written beside their place and then renamed into it; checksums; locks."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock


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


def write_json_whole(path: str | Path, value: dict[str, Any]) -> None:
    """Write a JSON file as `replacing` does; an iterator in `value` becomes an array, and is never held whole."""
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(_json_pieces(value))
        file.write("\n")


def _json_pieces(value: Any) -> Iterator[str]:
    """A JSON text: an entry of an object a line, an element of an array that was an iterator a line."""
    if isinstance(value, Iterator):
        yield from _enclosed("[", ([json.dumps(element, ensure_ascii=False)] for element in value), "]")
    elif isinstance(value, dict):
        entries = (chain([f"{json.dumps(key, ensure_ascii=False)}: "], _json_pieces(of)) for key, of in value.items())
        yield from _enclosed("{", entries, "}")
    else:
        yield json.dumps(value, ensure_ascii=False)


def _enclosed(begin: str, entries: Iterable[Iterable[str]], end: str) -> Iterator[str]:
    yield begin
    for number, entry in enumerate(entries):
        yield ",\n" if number else "\n"
        yield from entry
    yield f"\n{end}"


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


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have the file's content on the disk before its name is."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def lock_file(path: Path) -> FileLock:
    """Hold a lock that no other process has, in a file of its own; filelock's Timeout if one has it."""
    lock = FileLock(path, timeout=0)
    lock.acquire()
    return lock


def unlock_file(lock: FileLock) -> None:
    """Let another process have it, and leave no file behind where that can be helped."""
    with suppress(OSError):
        Path(lock.lock_file).unlink()
    lock.release()
