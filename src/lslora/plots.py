"""Pictures of splines, drawn from the records of `lslora.records`; every function returns a matplotlib `Figure`.

`figure.savefig(path)` writes it; the callback hands it to trackers and the report puts it into its page.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .records import LIVE_SHARE, Record, check_some, verdict

CELL = 0.43  # half the width of a small picture, of the 1 from one to the next
COLOURS = {
    "identity": "0.55",
    "barely moved": "tab:gray",
    "learning": "tab:blue",
    "curved": "tab:green",
    "overfitting": "tab:orange",
    "unstable": "tab:red",
    "not finite": "black",
}
MAX_LABELS = 60


def plot_splines(records: Sequence[Record]) -> Figure:
    """φ of every layer over the identity line, with the density of z behind it; a row a block, a column a module.

    Each small picture spans its layer's own grid, `[k_min, k_max]` in both directions. φ is coloured by its verdict
    and drawn as far as it stays within; the density is relative to its highest bin, and missing without observation.
    """
    layout = _layout(records)
    figure = Figure(figsize=(2.2 + 0.95 * len(layout.columns), 1.2 + 0.85 * len(layout.rows)), layout="constrained")
    axis = figure.subplots()
    densities, lines, colours = [], [], []
    for record, row, column in layout.places:
        centre = np.array([column, row])
        if record.get("density"):
            densities.append(centre + _silhouette(record["density"]))
        lines.append(centre + _curve(record))
        colours.append(COLOURS[verdict(record)])
    centres = np.array([[column, row] for _, row, column in layout.places], dtype=float)
    square = CELL * np.array([[-1, -1], [-1, 1], [1, 1], [1, -1]])
    axis.add_collection(PolyCollection([*(centres[:, None] + square)], facecolor="0.96", edgecolor="none"))
    axis.add_collection(PolyCollection(densities, facecolor="lightsteelblue", edgecolor="none", alpha=0.7))
    diagonals = centres[:, None] + CELL * np.array([[-1, 1], [1, -1]])
    axis.add_collection(LineCollection([*diagonals], colors="0.7", linewidths=0.8, linestyles="dashed"))
    axis.add_collection(LineCollection(lines, colors=colours, linewidths=1.6))
    _label_matrix(axis, layout)
    for spine in axis.spines.values():
        spine.set_visible(False)
    shown = [word for word in COLOURS if COLOURS[word] in colours]
    keys = [Line2D([], [], color=COLOURS[word], label=word) for word in shown]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), fontsize=8, frameon=False)
    figure.suptitle("φ(t) on each layer's grid; dashed: the identity; shaded: where z lies", fontsize=9)
    return figure


def plot_deviations(records: Sequence[Record]) -> Figure:
    """`φ(t) − t` against t, one panel for each kind of module, one line a layer, coloured by depth."""
    check_some(records)
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["layer"].rpartition(".")[2], []).append(record)
    columns = min(len(groups), 4)
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(1.2 + 2.4 * columns, 1.2 + 1.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis, (title, members) in zip(axes.flat, groups.items(), strict=False):
        axis.axhline(0, color="0.6", linewidth=0.8)
        for record, colour in zip(members, _by_depth(len(members)), strict=True):
            offsets = np.subtract(record["values"], record["grid"])
            axis.plot(record["grid"], offsets, color=colour, linewidth=1, marker="o", markersize=2)
        axis.set_title(title, fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    figure.suptitle(f"What {len(records)} splines add to plain LoRA", fontsize=11)
    figure.supxlabel("t, the scaled LoRA update", fontsize=9)
    figure.supylabel("φ(t) − t", fontsize=9)
    _depth_colourbar(figure, axes)
    return figure


def plot_heatmap(records: Sequence[Record]) -> Figure:
    """Deviation and slope variance of every layer, a row a block, a column a module."""
    layout = _layout(records)
    size = (2.5 + 1.1 * len(layout.columns), 1.5 + 0.17 * len(layout.rows))
    figure = Figure(figsize=size, layout="constrained")
    for axis, key in zip(figure.subplots(1, 2), ("deviation", "slope_variance"), strict=True):
        matrix = np.full((len(layout.rows), len(layout.columns)), np.nan)
        for record, row, column in layout.places:
            matrix[row, column] = record[key]
        figure.colorbar(axis.imshow(matrix, aspect="auto", cmap="viridis", vmin=0), ax=axis)
        _label_matrix(axis, layout)
        axis.set_xlabel(key.replace("_", " "), fontsize=9)
    return figure


def plot_occupancy(records: Sequence[Record]) -> Figure:
    """Share of the elements of z in every interval of every layer's grid, and outside of it.

    Raises:
        ValueError: z was observed in no layer.
    """
    observed = [record for record in records if record["occupancy"]]
    if not observed:
        raise ValueError("records must have an occupancy, observed in some layer; see observe_occupancy")
    shares = np.array([record["occupancy"] for record in observed])
    intervals = shares.shape[1] - 2
    figure = Figure(figsize=(3.5 + 0.6 * intervals, 1.6 + min(0.12 * len(observed), 6)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, aspect="auto", cmap="viridis", norm=LogNorm(1e-4, 1, clip=True))
    figure.colorbar(image, ax=axis, label=f"share of z (an interval below {LIVE_SHARE:g} is not live)")
    axis.set_xticks(range(intervals + 2), ["below", *map(str, range(1, intervals + 1)), "above"], fontsize=8)
    axis.set_xlabel("interval of the grid", fontsize=9)
    step = -(-len(observed) // MAX_LABELS)
    names = [record["layer"].removeprefix("model.layers.") for record in observed]
    axis.set_yticks(range(0, len(observed), step), names[::step], fontsize=6)
    return figure


def plot_course(course: Sequence[dict[str, Any]]) -> Figure:
    """Deviation and slope variance of every layer over the training steps, coloured by depth, with their mean.

    Args:
        course: What `lslora.callback.load_course` returns.

    Raises:
        ValueError: nothing was logged.
    """
    if not course:
        raise ValueError("a course must have an entry: the training had fewer steps than logging_steps")
    steps = [entry["step"] for entry in course]
    layers = list(course[-1]["layers"])
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for place, (axis, name) in enumerate(zip(axes, ("deviation", "slope variance"), strict=True)):
        values = np.array([[entry["layers"][layer][place] for layer in layers] for entry in course])
        for column, colour in zip(values.T, _by_depth(len(layers)), strict=True):
            axis.plot(steps, column, color=colour, linewidth=0.6, alpha=0.6)
        axis.plot(steps, values.mean(axis=1), color="black", linewidth=1.8, label="mean")
        axis.set_xlabel("step")
        axis.set_title(name, fontsize=9)
        axis.legend(fontsize=8, frameon=False)
    _depth_colourbar(figure, axes)
    return figure


class _Layout(NamedTuple):
    """Layers as a matrix: the rows' and columns' labels, and (record, row, column) of every layer."""

    rows: list[str]
    columns: list[str]
    places: list[tuple[Record, int, int]]


def _layout(records: Sequence[Record]) -> _Layout:
    """Rows by what a layer's name has up to its first number, columns by the rest of it."""
    check_some(records)
    split = [re.fullmatch(r"(.*?\d+(?=\.|$))?\.?(.*)", record["layer"]) for record in records]
    keys = [(found[1] or "", found[2]) for found in split if found]
    rows, columns = (list(dict.fromkeys(part)) for part in zip(*keys, strict=True))
    places = [(x, rows.index(row), columns.index(column)) for x, (row, column) in zip(records, keys, strict=True)]
    return _Layout(_shortened(rows), _shortened(columns), places)


def _shortened(names: list[str]) -> list[str]:
    """The names' last parts, if these tell them apart."""
    last = [name.rpartition(".")[2] for name in names]
    return last if len(set(last)) == len(last) else names


def _curve(record: Record) -> np.ndarray:
    """Points of φ (knots, 2) in a cell around the origin; up is smaller, as in a matrix."""
    grid, values = np.array(record["grid"]), np.array(record["values"])
    middle, half = (grid[0] + grid[-1]) / 2, (grid[-1] - grid[0]) / 2
    points = np.stack([grid - middle, middle - values], axis=1) / half * CELL
    return points.clip(-CELL, CELL)


def _silhouette(density: Sequence[float]) -> np.ndarray:
    """Outline of the bins (points, 2), standing on the lower edge of a cell around the origin."""
    edges = np.linspace(-CELL, CELL, len(density) + 1).repeat(2)
    heights = np.array([0, *np.repeat(density, 2), 0]) / (max(density) or 1) * 2 * CELL
    return np.stack([edges, CELL - heights], axis=1)


def _label_matrix(axis: Axes, layout: _Layout) -> None:
    axis.set_xlim(-0.5, len(layout.columns) - 0.5)
    axis.set_ylim(len(layout.rows) - 0.5, -0.5)
    axis.xaxis.tick_top()
    axis.set_xticks(range(len(layout.columns)), layout.columns, rotation=30, ha="left", fontsize=7)
    step = -(-len(layout.rows) // MAX_LABELS)
    axis.set_yticks(range(0, len(layout.rows), step), layout.rows[::step], fontsize=7)
    axis.tick_params(length=0)


def _by_depth(count: int) -> list[Any]:
    return [colormaps["viridis"](i / max(count - 1, 1)) for i in range(count)]


def _depth_colourbar(figure: Figure, axes: Any) -> None:
    bar = figure.colorbar(ScalarMappable(cmap="viridis"), ax=axes, shrink=0.6, ticks=[0, 1])
    bar.ax.set_yticklabels(["first layer", "last layer"], fontsize=8)
