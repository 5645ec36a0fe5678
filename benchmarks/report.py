"""Tables and pictures of a plan's runs: the best learning rate of every method, and paired differences over seeds.

The learning rate of a method is chosen on the even rows of the validation file and its results are reported on the odd
rows, so that choosing among many does not flatter the winner. All rows count where nothing was chosen on the file.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from cycler import cycler
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student_t
from scipy.stats import ttest_rel

from lslora.plots import plot_deviations
from lslora.records import AVERAGED, live_intervals

Record = dict[str, Any]
Cell = dict[float, dict[int, Record]]  # learning rate → seed → record

EVEN, ODD, ALL = "even", "odd", "all"
ROWS = {ODD: slice(1, None, 2), EVEN: slice(0, None, 2), ALL: slice(None)}
NLL, ACCURACY = "nats per completion token, less is better", "per cent right, more is better"
METRICS = {  # name → part of a record, its field, unit
    "nll": ("validation", "nll", NLL),
    "accuracy": ("validation", "accuracy", ACCURACY),
    "retained nll": ("retained", "nll", NLL),
    "retained accuracy": ("retained", "accuracy", ACCURACY),
}
SMOOTHING = 8
LEGEND_COLUMNS = 4
LIVE = 0.8  # a layer is live if this share of its intervals holds 1 % of the elements of z


class Difference(NamedTuple):
    """A method minus the baseline over the seeds both have: mean, 95 % interval, p (two-sided paired t-test).

    These are of other seeds on the same rows. `of_all` is a 95 % interval of other seeds on other rows: the halves of
    the two intervals added as standard errors are, by their squares.
    """

    seeds: int
    mean: float
    low: float
    high: float
    p: float
    of_all: tuple[float, float]


def report(records: list[Record], baseline: str = "lora", rows: str = ODD) -> None:
    """Print the tables: what was chosen on the even rows, and on `rows`, a key of `ROWS`, what came of it.

    Raises:
        ValueError: `baseline` is no method of the records.
    """
    console = Console(width=140)
    cells = group(records)
    if baseline not in (methods := {name for _, name in cells}):
        raise ValueError(f"the baseline must be one of {sorted(methods)}, got {baseline!r}")
    for metric in metrics_of(records):
        console.print(rate_table(cells, metric))
        console.print(difference_table(cells, metric, baseline, rows))
    console.print(spline_table(cells))


def draw(records: list[Record], folder: Path) -> None:
    """Save `learning_rates.png`, `differences.png`, `learning_curves.png` and the `splines_*.png`; `retained.png`."""
    cells = group(records)
    for (r, name), cell in cells.items():
        record = next(iter(cell[best_rate(cell)].values()))
        if "splines" in record:
            plot_deviations(record["splines"]).savefig(folder / f"splines_{name}_r{r}.png", dpi=130)
    plot_rates(cells, folder / "learning_rates.png")
    plot_differences(cells, metrics_of(records), "lora", folder / "differences.png")
    plot_curves(cells, folder / "learning_curves.png")
    if "retained nll" in metrics_of(records):
        plot_retained(cells, folder / "retained.png")


def metrics_of(records: list[Record]) -> list[str]:
    """Those that every run has that did not diverge."""
    finite = [record for record in records if not record["diverged"]]
    return [
        metric for metric, (part, name, _) in METRICS.items() if all(name in record.get(part, ()) for record in finite)
    ]


def group(records: list[Record]) -> dict[tuple[int, str], Cell]:
    """(rank, method) → learning rate → seed → record."""
    cells: dict[tuple[int, str], Cell] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        run = record["run"]
        cells[run["r"], run["name"]][run["lr"]][run["seed"]] = record
    return cells


def score(record: Record, metric: str, rows: str) -> float:
    """The metric over those of the measured rows that `rows` names; the worst there is where the run diverged."""
    if record["diverged"]:
        return math.inf if METRICS[metric][1] == "nll" else 0.0
    values, weights = row_values(record, metric, rows)
    return sum(values) / sum(weights)


def row_values(record: Record, metric: str, rows: str) -> tuple[list[float], list[int]]:
    """What each row adds to the metric and how much it weighs: the metric is the sum of the ones over the others'."""
    part, name, _ = METRICS[metric]
    found, taken = record[part], ROWS[rows]
    if name == "accuracy":
        return [100.0 * correct for correct in found["row_correct"][taken]], [1] * len(found["row_correct"][taken])
    return found["row_nll"][taken], found["row_tokens"][taken]


def mean_score(seeds: dict[int, Record], metric: str, rows: str) -> float:
    return fmean(score(record, metric, rows) for record in seeds.values())


def best_rate(cell: Cell) -> float:
    """The learning rate of the least mean nll on the even rows: among those with the most seeds, over these seeds."""
    most = max(map(len, cell.values()))
    finalists = [rate for rate, seeds in cell.items() if len(seeds) == most]
    return min(finalists, key=lambda rate: mean_score(cell[rate], "nll", EVEN))


def common_seeds(cell: Cell) -> dict[float, dict[int, Record]]:
    """The cell with the seeds alone that all its learning rates have, so that rates can be compared."""
    seeds = set.intersection(*(set(records) for records in cell.values()))
    return {rate: {seed: cell[rate][seed] for seed in sorted(seeds)} for rate in sorted(cell)}


def is_bracketed(cell: Cell, rate: float) -> bool:
    """Whether a lower and a higher learning rate were tried as well."""
    return min(cell) < rate < max(cell)


def difference(cell: Cell, baseline: Cell, metric: str, rows: str = ODD) -> Difference | None:
    """The method's best learning rate minus the baseline's, on `rows`; None below two common seeds."""
    ours, theirs = cell[best_rate(cell)], baseline[best_rate(baseline)]
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return None
    a, b = ([score(side[seed], metric, rows) for seed in seeds] for side in (ours, theirs))
    test = ttest_rel(a, b)
    low, high = test.confidence_interval(0.95)
    mean = fmean(a) - fmean(b)
    half = math.hypot((high - low) / 2, rows_half([ours[s] for s in seeds], [theirs[s] for s in seeds], metric, rows))
    return Difference(len(seeds), mean, low, high, test.pvalue, (mean - half, mean + half))


def rows_half(ours: list[Record], theirs: list[Record], metric: str, rows: str) -> float:
    """Half the 95 % interval (Student's t) that a mean difference has from the choice of the rows, given the seeds.

    The nll is a ratio, of what its rows have to their tokens, so a row counts by what it has beyond its tokens' share.
    """
    if any(record["diverged"] for record in (*ours, *theirs)):
        return math.nan
    sides = [np.array([row_values(record, metric, rows)[0] for record in side]) for side in (ours, theirs)]
    means = (sides[0] - sides[1]).mean(axis=0)
    weights = np.array(row_values(ours[0], metric, rows)[1])
    beyond = means - weights * means.sum() / weights.sum()
    error = math.sqrt(len(means) * beyond.var(ddof=1)) / weights.sum()
    return float(student_t.ppf(0.975, len(means) - 1) * error)


def add_column(table: Table, heading: str) -> None:
    """Numbers to the right; methods' names, which must be told apart, whole and to the left."""
    is_name = heading == "method"
    table.add_column(heading, justify="left" if is_name else "right", no_wrap=is_name)


def rate_table(cells: dict[tuple[int, str], Cell], metric: str) -> Table:
    """Means at every learning rate over the seeds that a method has at all of them."""
    rates = sorted({rate for cell in cells.values() for rate in cell})
    table = Table(
        title=f"{metric} on the even rows, seeds that all rates of a method have, {METRICS[metric][2]}",
        caption="best lr: of the rates with the most seeds, over these seeds",
    )
    for heading in ("r", "method", *(f"lr {rate:g}" for rate in rates), "best lr", "bracketed"):
        add_column(table, heading)
    for (r, name), cell in sorted(cells.items()):
        common = common_seeds(cell)
        means = [f"{mean_score(common[rate], metric, EVEN):.4f}" if common.get(rate) else "" for rate in rates]
        best = best_rate(cell)
        table.add_row(str(r), name, *means, f"{best:g}", "yes" if is_bracketed(cell, best) else "no")
    return table


def difference_table(cells: dict[tuple[int, str], Cell], metric: str, baseline: str, rows: str) -> Table:
    """Every method at its best learning rate, and its paired difference from the baseline at its own."""
    table = Table(title=f"{metric} on the {rows} rows, each method at its best learning rate")
    headings = ("r", "method", "lr", "seeds", "parameters", "mean")
    for heading in (*headings, f"minus {baseline}", "95 % interval", "p", "of other rows too"):
        add_column(table, heading)
    for (r, name), cell in sorted(cells.items()):
        rate = best_rate(cell)
        found = list(cell[rate].values())
        row = [str(r), name, f"{rate:g}", str(len(found)), f"{found[0]['trainable_parameters']:,}"]
        row.append(f"{fmean(score(x, metric, rows) for x in found):.4f}")
        other = cells.get((r, baseline))
        d = difference(cell, other, metric, rows) if other and name != baseline else None
        row += [f"{d.mean:+.4f}", interval(d.low, d.high), f"{d.p:.2g}", interval(*d.of_all)] if d else [""] * 4
        table.add_row(*row)
    return table


def interval(low: float, high: float) -> str:
    return f"[{low:+.4f}, {high:+.4f}]"


def spline_table(cells: dict[tuple[int, str], Cell]) -> Table:
    """What the splines of every method look like at its best learning rate, averaged over layers and seeds."""
    table = Table(title="splines, each method at its best learning rate")
    for heading in ("r", "method", "deviation", "slope variance", "input scale", "output scale", "live layers"):
        add_column(table, heading)
    for (r, name), cell in sorted(cells.items()):
        layers = [layer for record in cell[best_rate(cell)].values() for layer in record.get("splines", ())]
        if layers:
            means = [fmean(layer[key] for layer in layers) for key in AVERAGED]
            shares = [live for live in map(live_intervals, layers) if live is not None]
            live = f"{fmean(share >= LIVE for share in shares):.0%}" if shares else "-"
            table.add_row(str(r), name, *(f"{mean:.4f}" for mean in means), live)
    return table


def rank_panels(cells: dict[tuple[int, str], Cell]) -> tuple[Figure, list[tuple[int, Axes, dict[str, Cell]]]]:
    """A figure with a panel for each rank, and of every panel the rank, its axes and the methods' cells by name."""
    ranks = sorted({r for r, _ in cells})
    methods = [{name: cell for (rank, name), cell in sorted(cells.items()) if rank == r} for r in ranks]
    legend = 0.13 * -(-max(map(len, methods)) // LEGEND_COLUMNS)  # inches
    figure = Figure(figsize=(1 + 5 * len(ranks), 4.5 + legend), layout="constrained")
    axes = figure.subplots(1, len(ranks), sharey=True, squeeze=False)[0]
    for axis in axes:
        axis.set_prop_cycle(cycler(linestyle=["-", "--", ":", "-."]) * rcParams["axes.prop_cycle"])
    return figure, list(zip(ranks, axes, methods, strict=True))


def name_lines(axis: Axes) -> None:
    """A legend below the panel, which many methods leave as it is."""
    axis.legend(fontsize=6, ncols=LEGEND_COLUMNS, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def plot_rates(cells: dict[tuple[int, str], Cell], path: Path) -> None:
    """nll against the learning rate on one seed, one panel for each rank, one line for each method.

    Two seeds lie further apart than two methods, so a mean over more of them stands beside nothing. The highest tenth
    of the points lies above the picture: a training that nearly diverged would flatten the rest.
    """
    figure, panels = rank_panels(cells)
    seed, heights = most_common_seed(cells), []
    for r, axis, methods in panels:
        for name, cell in methods.items():
            if not any(cell):  # the untrained model has no rate, and would flatten the others' lines
                continue
            points = [(lr, score(seeds[seed], "nll", EVEN)) for lr, seeds in sorted(cell.items()) if seed in seeds]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=name)
            heights += [height for _, height in points]
        axis.set(xscale="log", xlabel="learning rate", title=f"r = {r}")
        name_lines(axis)
    finite = [height for height in heights if math.isfinite(height)]  # not of those that diverged
    low, high = np.quantile(finite, [0, 0.9]) if finite else (0, 0)
    if low < high:
        panels[0][1].set_ylim(low - 0.05 * (high - low), high)
    figure.supylabel(f"nll, even rows, seed {seed}", fontsize=9)
    figure.savefig(path, dpi=130)


def most_common_seed(cells: dict[tuple[int, str], Cell]) -> int:
    """The seed that most learning rates of most methods have, the first of several."""
    found = Counter(seed for cell in cells.values() for seeds in cell.values() for seed in seeds)
    return min(found, key=lambda seed: (-found[seed], seed))


def plot_differences(cells: dict[tuple[int, str], Cell], metrics: list[str], baseline: str, path: Path) -> None:
    """Dots and 95 % intervals of the paired differences, one panel for each metric."""
    compared = [(r, name) for r, name in sorted(cells, reverse=True) if name != baseline and (r, baseline) in cells]
    panels = {
        metric: {key: d for key in compared if (d := difference(cells[key], cells[key[0], baseline], metric))}
        for metric in metrics
    }
    rows = max(map(len, panels.values()))
    figure = Figure(figsize=(1.5 + 5 * len(metrics), 1.2 + 0.35 * rows), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axis, (metric, differences) in zip(axes, panels.items(), strict=True):
        for place, d in enumerate(differences.values()):
            axis.plot([d.low, d.high], [place] * 2, color="C0", linewidth=1.5)
            axis.plot(d.mean, place, marker="o", color="C0")
        axis.axvline(0, color="0.6", linewidth=0.8)
        labels = [f"{name}, r = {r} ({d.seeds} seeds)" for (r, name), d in differences.items()]
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        axis.set_ylim(-0.5, max(rows, 1) - 0.5)
        axis.set_xlabel(f"{metric} minus {baseline}'s, odd rows", fontsize=9)
        axis.locator_params(axis="x", nbins=6)
    figure.savefig(path, dpi=130)


def plot_curves(cells: dict[tuple[int, str], Cell], path: Path) -> None:
    """Training loss by step, averaged over seeds and over windows of steps, each method at its best learning rate."""
    figure, panels = rank_panels(cells)
    for r, axis, methods in panels:
        for name, cell in methods.items():
            runs = [x["losses"] for x in cell[best_rate(cell)].values() if not x["diverged"]]
            if runs:
                means = [fmean(step) for step in zip(*runs, strict=True)]
                smooth = [fmean(means[max(0, i + 1 - SMOOTHING) : i + 1]) for i in range(len(means))]
                axis.plot(range(1, len(smooth) + 1), smooth, linewidth=1, label=name)
        axis.set(xlabel="step", title=f"r = {r}", yscale="log")
        name_lines(axis)
    figure.supylabel(f"training loss, mean of {SMOOTHING} steps", fontsize=9)
    figure.savefig(path, dpi=130)


def plot_retained(cells: dict[tuple[int, str], Cell], path: Path) -> None:
    """What is left of what the model knew against what it learned, a point for each rate over common seeds."""
    figure, panels = rank_panels(cells)
    for r, axis, methods in panels:
        for name, cell in methods.items():
            common = {lr: seeds for lr, seeds in common_seeds(cell).items() if seeds}
            points = [[mean_score(x, metric, ODD) for x in common.values()] for metric in ("nll", "retained nll")]
            axis.plot(*points, marker="o", markersize=3, linewidth=1, label=name)
            for lr, x, y in zip(common, *points, strict=True):
                axis.annotate(f" {lr:g}", (x, y), fontsize=6)
        axis.set(xlabel="nll, odd rows", title=f"r = {r}")
        name_lines(axis)
    figure.supylabel("retained nll, odd rows", fontsize=9)
    figure.savefig(path, dpi=130)
