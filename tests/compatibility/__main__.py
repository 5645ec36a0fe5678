"""Run every operation and write the page: `python -m tests.compatibility`."""

from __future__ import annotations

import warnings
from pathlib import Path

from rich.progress import track

from .page import page, results

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(results(track)), encoding="utf-8")
    print(f"wrote {PAGE}")
