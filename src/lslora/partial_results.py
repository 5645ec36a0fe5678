"""The predictions of an evaluation on disk, as they come: what it goes on from, and what its results are made of."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import Timeout

from .files import lock_file, unlock_file
from .scoring import Prediction


class PartialResults:
    """A JSONL file: the evaluation's settings, then `{"side": …, "prediction": …}` a line, one side after the other.

    Args:
        path: The file; made if it is not there. A last line without its end was cut short and is dropped.
        settings: Everything that the predictions depend on.

    Raises:
        ValueError: the file is of an evaluation with other settings that has predictions, or none of ours, or another
            process is at it; it stays as it is.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.counts = path, Counter[str]()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = lock_file(Path(f"{path}.lock"))
        except Timeout as error:
            raise ValueError(f"another evaluation is writing {path}: choose another --output") from error
        try:
            end = self._check(settings) if path.exists() else 0
            self.file = path.open("r+b" if path.exists() else "w+b")
            self.file.truncate(end)
            self.file.seek(0, os.SEEK_END)
            if not end:
                self.write(settings)
        except BaseException:
            unlock_file(self._lock)
            raise

    def add(self, side: str, prediction: Prediction) -> None:
        """Write one prediction; it is kept whatever happens next to this process."""
        self.write({"side": side, "prediction": prediction})
        self.counts[side] += 1

    def read(self, side: str) -> Iterator[Prediction]:
        """The predictions of one side that are there now, in the order in which they came."""
        return islice(self._read(side), self.counts[side])

    def __enter__(self) -> PartialResults:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process go on; without a prediction there is nothing to go on from, and the file is removed."""
        self.file.close()
        if not self.counts:
            self.path.unlink()
        unlock_file(self._lock)

    def delete(self) -> None:
        """Remove the closed file."""
        self.path.unlink(missing_ok=True)

    def write(self, value: dict[str, Any]) -> None:
        self.file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        self.file.flush()

    def _read(self, side: str) -> Iterator[Prediction]:
        with self.path.open("rb") as lines:
            next(lines)
            for line in lines:
                entry = json.loads(line)
                if entry["side"] == side:
                    yield entry["prediction"]

    def _check(self, settings: dict[str, Any]) -> int:
        """Count the predictions of each side; return where the last whole line ends."""
        end, header = 0, settings
        remedy = f"delete {self.path} or choose another --output"
        try:
            with self.path.open("rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        break
                    entry = json.loads(line)
                    if not end:
                        header = entry
                    elif isinstance(entry["prediction"]["index"], int):
                        self.counts[entry["side"]] += 1
                    end += len(line)
            different = [name for name in settings if header[name] != settings[name]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no partial result of this script: {remedy}") from error
        if different and not self.counts:
            return 0
        if different:
            was = "; ".join(f"{name} was {header[name]!r} and is {settings[name]!r}" for name in different)
            raise ValueError(f"{self.path} holds results of other settings ({was}): {remedy}")
        return end
