"""Draw what `benchmarks.layer`, `train_step` and `inference` measured: bars over peft's LoRA, with 20 to 80 % ranges.

    python -m benchmarks.draw_speed FILE

draws the last record of FILE into a PNG beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .layer import BASELINE


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    path = parser.parse_args(argv).file
    record = json.loads(path.read_text(encoding="utf-8"))[-1]
    draw(record, path.with_suffix(".png"))
    print(path.with_suffix(".png"))
    return 0


def draw(record: dict[str, Any], path: Path) -> None:
    """One panel for every case, one bar for every provider: median over LoRA's median, and the range."""
    cases: dict[str, dict[str, Any]] = {}
    for result in record["results"]:
        shape = "×".join(map(str, result["shape"]))
        cases.setdefault(f"{result['model']}\n{shape}, {result['tokens']}", {})[result["provider"]] = result
    columns = min(4, len(cases))
    rows = -(-len(cases) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, (title, by) in zip(panels, cases.items(), strict=False):
        unit = by[BASELINE]["median"]
        low, middle, high = ([found[key] / unit for found in by.values()] for key in ("p20", "median", "p80"))
        below = [m - v for m, v in zip(middle, low, strict=True)]
        above = [v - m for m, v in zip(middle, high, strict=True)]
        colors = ["C0" if name.startswith("lslora") else "0.7" for name in by]
        panel.barh(list(by), middle, xerr=[below, above], color=colors, ecolor="0.3", capsize=2)
        panel.axvline(1, color="k", linewidth=0.8)
        panel.invert_yaxis()
        panel.set_title(title, fontsize=9)
        panel.tick_params(labelsize=8)
    for panel in panels[len(cases) :]:
        panel.axis("off")
    figure.suptitle(f"time over {BASELINE}'s: {record['benchmark']}, {record['device']}", fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
