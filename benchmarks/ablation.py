"""From the broken first implementation (V0) to the method (V7), one fix at a time, beside what was once claimed.

    python -m benchmarks.ablation --data FOLDER

trains V0 to V7 and plain LoRA on the plan `ablation` (see `benchmarks.quality`), prints the table, and draws
`benchmarks/results/ablation/ablation.png`. The claims were accuracies of Phi-3-mini on commonsense questions; what is
measured here is the likelihood of held-out rationales under a small model, so only the order can be compared.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from .quality import RESULTS, do_runs, load_records, read_plan

PLAN = Path(__file__).parent / "plans" / "ablation.toml"

# What each version changes against the one before, and the accuracy in per cent that was claimed for it, if any.
VERSIONS = {
    "v0": ("the first implementation", "broken"),
    "v1": ("starts as the identity", ""),
    "v2": ("grid on [−3, 3]", ""),
    "v3": ("clamp instead of tanh", ""),
    "v4": ("output scale starts at 1", ""),
    "v5": ("piecewise interpolation", ""),
    "v6": ("penalty 0.01 instead of 1e-4", ""),
    "v7": ("learning rate 2e-4 instead of 5e-5: the method", "82 to 85"),
    "lora": ("plain LoRA at 2e-4", "80.2"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("."), help="folder that the plan's paths start from")
    parser.add_argument("--results", type=Path, default=RESULTS, help="holds a folder for each plan")
    args = parser.parse_args(argv)
    setting, runs = read_plan(PLAN)
    folder = args.results / PLAN.stem
    do_runs(setting, runs, args.data, folder)
    found = by_version(load_records(runs, folder))
    Console(width=120).print(table(found))
    plot(found, folder / "ablation.png")
    return 0


def by_version(records: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Version → held-out nll of every seed."""
    found: dict[str, list[float]] = {}
    for record in records:
        found.setdefault(record["run"]["name"], []).append(record["validation"]["nll"])
    return {name: found[name] for name in VERSIONS if name in found}


def table(found: dict[str, list[float]]) -> Table:
    shown = Table(title="nats per held-out completion token, less is better")
    for heading in ("version", "changes", "seeds", "nll", "against the one before", "claimed accuracy, %"):
        shown.add_column(heading, justify="left" if heading in ("version", "changes") else "right")
    before = None
    for name, values in found.items():
        change, claim = VERSIONS[name]
        mean = fmean(values)
        spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
        step = "" if before is None else f"{mean - before:+.4f}"
        shown.add_row(name.upper(), change, str(len(values)), f"{mean:.4f}{spread}", step, claim)
        before = mean
    return shown


def plot(found: dict[str, list[float]], path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    names = list(found)
    axis.plot(range(len(names)), [fmean(found[name]) for name in names], color="0.7", linewidth=1)
    for place, name in enumerate(names):
        axis.scatter([place] * len(found[name]), found[name], s=18, color="C0")
    labels = [f"{name.upper()}\n{VERSIONS[name][1]}" for name in names]
    axis.set_xticks(range(len(names)), labels, fontsize=8)
    axis.set_ylabel("nats per held-out token")
    axis.set_xlabel("version, and the accuracy in per cent once claimed for it", fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
