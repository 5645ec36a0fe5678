"""Records of splines, of which `lslora.diagnostics` takes them: → averages, words, a file, a table; no torch.

A record is a flat dict of one layer's spline; `pandas.DataFrame(records)` is a table of them:

| key | meaning |
|---|---|
| `layer` | name of the adapted layer |
| `grid`, `values` | knot positions `k_i` and heights `v_i`, K numbers each |
| `deviation` | `mean_i abs(v_i − k_i)`: 0 at the start, 0.01 to 0.1 learning, above 1 overfitting |
| `slope_variance` | `var_i((v_{i+1} − v_i) / Δk)`: 0 at the start, above 0.05 meaningful curvature, above 1 unstable |
| `input_scale`, `output_scale` | numbers, 1 at the start |
| `grid_scale` | factor on the grid and the values (`calibration_steps`; 0 until it is known), else 1 |
| `occupancy` | share of the elements of z below the grid, in each of its K − 1 intervals, and above it; or None |
| `density` | the same of z within the grid in finer bins, 48 or more of equal width; or None |
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .files import write_whole

if TYPE_CHECKING:
    from rich.table import Table

Record = dict[str, Any]

AVERAGED = ("deviation", "slope_variance", "input_scale", "output_scale")
SHOWN = ("layer", "grid", "values", "occupancy", *AVERAGED)  # in tables and pictures
LIVE_SHARE = 0.01
CURVED, UNSTABLE = 0.05, 1.0  # slope variance
LEARNING, OVERFITTING = 0.01, 1.0  # deviation


def check_some(records: Sequence[Record]) -> None:
    """Raise ValueError if there is no record."""
    if not records:
        raise ValueError("records must have a layer, got none")


def averages(records: Sequence[Record]) -> dict[str, float]:
    """Means over the layers of what is `AVERAGED`; ValueError without a record."""
    check_some(records)
    return {key: fmean(record[key] for record in records) for key in AVERAGED}


def mean_metrics(records: Sequence[Record]) -> dict[str, float]:
    """The averages as `spline/<key>`; empty without a record."""
    return {f"spline/{key}": mean for key, mean in averages(records).items()} if records else {}


def verdict(record: Record) -> str:
    """The record's deviation and slope variance in words."""
    deviation, slope_variance = record["deviation"], record["slope_variance"]
    if not math.isfinite(deviation + slope_variance):
        return "not finite"
    if slope_variance > UNSTABLE:
        return "unstable"
    if deviation > OVERFITTING:
        return "overfitting"
    if slope_variance > CURVED:
        return "curved"
    if deviation >= LEARNING:
        return "learning"
    return "barely moved" if deviation > 0 else "identity"


def live_intervals(record: Record) -> float | None:
    """Share of the grid's intervals that hold at least 1 % of the elements of z, or None if z was not observed."""
    if record["occupancy"] is None:
        return None
    inner = record["occupancy"][1:-1]
    return sum(share >= LIVE_SHARE for share in inner) / len(inner)


def mean_live(records: Sequence[Record]) -> float | None:
    """The mean of `live_intervals` over the layers where z was observed, or None if it was in none."""
    observed = [live for live in map(live_intervals, records) if live is not None]
    return fmean(observed) if observed else None


def save_records(records: list[Record], path: str | Path) -> None:
    """Write `{"layers": records, "mean": averages, "verdicts": counts}` as JSON, whole or not at all.

    Raises:
        ValueError: there is no record.
    """
    verdicts = [verdict(record) for record in records]
    summary = {
        "mean": averages(records),
        "verdicts": {word: verdicts.count(word) for word in sorted(set(verdicts))},
        "layers": [{**record, "verdict": word} for record, word in zip(records, verdicts, strict=True)],
    }
    write_whole(path, json.dumps(summary, indent=2) + "\n")


def load_records(path: str | Path) -> list[Record]:
    """The records that `save_records` wrote.

    Raises:
        ValueError: the file is no such file.
        OSError: it cannot be read.
    """
    try:
        records = list(json.loads(Path(path).read_text(encoding="utf-8"))["layers"])
        for record, name in product(records, SHOWN):
            record[name]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a file that save_records wrote: {error!r}") from error
    return records


def spline_table(records: list[Record], max_rows: int = 12) -> Table:
    """A table for the terminal: the layers that deviate most, and the mean over all of them; ValueError for none."""
    from rich.table import Table

    means, mean_share = averages(records), mean_live(records)
    table = Table(title=f"Splines of {len(records)} layers, those that deviate most")
    table.add_column("layer", overflow="fold", min_width=10)
    for heading in ("deviation", "slope\nvariance", "input\nscale", "output\nscale", "live\nintervals"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)  # what the table is read for
    shown = sorted(records, key=lambda r: r["deviation"], reverse=True)[:max_rows]
    for record in shown:
        live = live_intervals(record)
        numbers = [f"{record[key]:.4f}" for key in AVERAGED]
        table.add_row(
            record["layer"].removeprefix("model.layers."),
            *numbers,
            "-" if live is None else f"{live:.0%}",
            verdict(record),
        )
    table.add_section()
    table.add_row(
        f"mean of {len(records)}",
        *(f"{mean:.4f}" for mean in means.values()),
        "-" if mean_share is None else f"{mean_share:.0%}",
        "",
    )
    return table
