"""Coverage-guided fuzzing of the loaders with atheris, on Linux.

    python -m tests.torture.fuzz_data tests/torture/corpus/data -max_total_time=60

The arguments are libFuzzer's. What it finds worth keeping it adds to the first folder, from where git leaves it out;
a file that breaks a loader it leaves as `crash-...`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import gettempdir

import atheris

with atheris.instrument_imports(include=["lslora.answers", "lslora.data", "lslora.json_rows"]):
    from .data_check import LOADERS, judge

# libFuzzer ends the process without ado, so that no temporary folder would be taken away: one file, used again.
PATH = Path("/dev/shm" if os.path.isdir("/dev/shm") else gettempdir()) / f"fuzz_data_{os.getuid()}_{os.getpid()}"


class LoaderError(Exception):
    """A loader raised anything but DataError, or took what is not valid."""


def check(content: bytes) -> None:
    """All loaders on a file with this content."""
    PATH.write_bytes(content)
    try:
        for name, loader in LOADERS.items():
            verdict = judge(loader, PATH)
            if verdict.kind in ("traceback", "silent"):
                raise LoaderError(f"{name}: {verdict.kind}: {verdict.message}")
    finally:
        PATH.unlink()


if __name__ == "__main__":
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()
