"""One page about a training: `python -m lslora.report DIR` makes `DIR/report.html`, which opens without a network.

It reads what a run leaves in its output folder (`train_lslora.py`, or any trainer with `SplineCallback`) and shows
what is there: the loss, the accuracy, the splines, the settings.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from rich.console import Console
from transformers.trainer_utils import get_last_checkpoint

from . import plots
from .callback import DIAGNOSTICS, load_course
from .checkpoints import last_sealed_checkpoint
from .files import write_whole
from .records import AVERAGED, Record, averages, live_intervals, load_records, mean_live, verdict
from .run_folder import RUN, STATE, read_json_object, read_run
from .scoring import format_comparison

REPORT = "report.html"


def main(argv: list[str] | None = None) -> int:
    """Write the page; 0 when it is written, 2 when the folder cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m lslora.report", description="One page about a training.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="output folder of a training")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"by default DIR/{REPORT}")
    args = parser.parse_args(argv)
    try:
        with Console(stderr=True).status("drawing"):
            path = write_report(args.folder, args.output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


def write_report(folder: str | Path, path: str | Path | None = None) -> Path:
    """Write the page about a training.

    Args:
        folder: The output folder: `trainer_state.json` (its own or the last checkpoint's) and, where they are there,
            `run.json`, `spline_diagnostics.json`, `spline_course.jsonl`.
        path: Where to; by default `report.html` in the folder.

    Returns:
        The path.

    Raises:
        ValueError: the folder holds no log of a training, or a file of another kind.
        OSError: a file cannot be read or written.
    """
    folder = Path(folder)
    path = Path(path) if path else folder / REPORT
    state = _load_state(folder)
    run = read_run(folder) if (folder / RUN).is_file() else {}
    plain = run.get("settings", {}).get("method") == "lora"  # what splines are there are of an earlier run
    records = load_records(folder / DIAGNOSTICS) if (folder / DIAGNOSTICS).is_file() and not plain else []
    page = _render(folder.resolve().name, state, run, records, [] if plain else load_course(folder))
    write_whole(path, page)
    return path


def _load_state(folder: Path) -> dict[str, Any]:
    """The folder's own log, or the last checkpoint's: of a run that did not end, or that went on and was stopped."""
    # With run.json there are seals, which a new run takes from an earlier one's checkpoints; other trainers have none.
    sealed, last = last_sealed_checkpoint(folder), get_last_checkpoint(str(folder)) if folder.is_dir() else None
    states = [read_json_object(place / STATE) for place in (folder, sealed) if place and (place / STATE).is_file()]
    if not states and last and Path(last, STATE).is_file() and not (folder / RUN).is_file():
        states = [read_json_object(Path(last, STATE))]
    if not states:
        raise ValueError(
            f"{folder} must be the output folder of a training, with {STATE} or a checkpoint, found neither"
        )
    return max(states, key=lambda state: state.get("global_step", 0))


def _render(
    title: str, state: dict[str, Any], run: dict[str, Any], records: list[Record], course: list[dict[str, Any]]
) -> str:
    losses = [entry for entry in state.get("log_history", ()) if "loss" in entry]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("lslora").joinpath("report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        step=state.get("global_step"),
        losses=losses,
        run=run,
        comparison=format_comparison(run["comparison"]) if "comparison" in run else "",
        records=sorted(records, key=lambda record: -record["deviation"]),
        columns=AVERAGED,
        verdict=verdict,
        live_intervals=live_intervals,
        verdicts={word: count for word in plots.COLOURS if (count := list(map(verdict, records)).count(word))},
        means=averages(records) if records else {},
        live=mean_live(records),
        pictures={name: _embedded(figure) for name, figure in _figures(losses, run, records, course).items()},
    )


def _figures(
    losses: list[dict[str, Any]], run: dict[str, Any], records: list[Record], course: list[dict[str, Any]]
) -> dict[str, Figure]:
    """The pictures there is something to draw for."""
    figures = {}
    if losses:
        figures["training"] = _plot_training(losses)
    if "accuracy" in run:
        figures["accuracy"] = _plot_accuracy(run["accuracy"])
    if records:
        figures["splines"] = plots.plot_splines(records)
        figures["deviations"] = plots.plot_deviations(records)
        figures["heatmap"] = plots.plot_heatmap(records)
    if any(record["occupancy"] for record in records):
        figures["occupancy"] = plots.plot_occupancy(records)
    if course:
        figures["course"] = plots.plot_course(course)
    return figures


def _plot_training(losses: list[dict[str, Any]]) -> Figure:
    """Loss, learning rate and gradient norm over the steps, as far as they were logged."""
    named = {"loss": "loss", "learning_rate": "learning rate of A and B", "grad_norm": "norm of the gradients"}
    shown = {key: title for key, title in named.items() if any(key in entry for entry in losses)}
    figure = Figure(figsize=(3.6 * len(shown), 2.8), layout="constrained")
    for axis, (key, title) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        points = [(entry["step"], entry[key]) for entry in losses if key in entry]
        axis.plot(*zip(*points, strict=True), linewidth=1.2, marker="o" if len(points) < 30 else None, markersize=3)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
    return figure


def _plot_accuracy(summaries: dict[str, Any]) -> Figure:
    """Dots and 95 % intervals, a row a task and a colour a model."""
    tasks = {task for summary in summaries.values() for task in summary["tasks"]}
    rows = [*sorted(tasks), "all items"]
    figure = Figure(figsize=(7, 1.2 + 0.34 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for place, (name, summary) in enumerate(summaries.items()):
        found = {**summary["tasks"], "all items": summary["micro"]}
        heights = [row + 0.22 * (place - (len(summaries) - 1) / 2) for row in range(len(rows))]
        present = [(found[task], y) for task, y in zip(rows, heights, strict=True) if task in found]
        axis.hlines(
            [y for _, y in present],
            [100 * figures["interval"][0] for figures, _ in present],
            [100 * figures["interval"][1] for figures, _ in present],
            color=f"C{place}",
        )
        axis.plot(
            [100 * f["accuracy"] for f, _ in present], [y for _, y in present], "o", color=f"C{place}", label=name
        )
    axis.set_yticks(range(len(rows)), rows, fontsize=8, parse_math=False)  # a $ is no formula
    axis.invert_yaxis()
    axis.set_xlabel("accuracy in per cent, with 95 % intervals", fontsize=8)
    axis.legend(fontsize=8)
    return figure


def _embedded(figure: Figure) -> str:
    """The picture as the `src` of an image."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


if __name__ == "__main__":
    sys.exit(main())
