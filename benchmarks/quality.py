"""Compare methods on held-out rows: a matrix of methods, ranks, learning rates and seeds.

    python -m benchmarks.quality --plan benchmarks/plans/NAME.toml --data FOLDER
    python -m benchmarks.quality report --plan benchmarks/plans/NAME.toml

The first writes one JSON file for each run into `benchmarks/results/NAME/` and skips what is there, so that it goes on
after a kill. Started several times, at once, the processes share the work.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from .runs import Bench, Run, Setting

RESULTS = Path(__file__).parent / "results"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--plan", type=Path, required=True, help="TOML file with the matrix of runs")
    parser.add_argument("--data", type=Path, default=Path("."), help="folder that the plan's paths start from")
    parser.add_argument("--results", type=Path, default=RESULTS, help="holds a folder for each plan")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these, all by default")
    parser.add_argument("--lr", type=float, nargs="+", help="only these learning rates, all by default")
    parser.add_argument("--r", type=int, nargs="+", help="only these ranks, all by default")
    parser.add_argument("--methods", nargs="+", help="only these, all by default")
    parser.add_argument("--baseline", default="lora", help="method that a report compares the others with")
    parser.add_argument("--rows", choices=("odd", "even", "all"), default="odd", help="that a report tells of")
    args = parser.parse_args(argv)
    setting, runs = read_plan(args.plan)
    wanted = {"seed": args.seeds, "lr": args.lr, "r": args.r, "name": args.methods}
    part = [run for run in runs if all(not some or getattr(run, name) in some for name, some in wanted.items())]
    folder = args.results / args.plan.stem
    if args.command == "run":
        return do_runs(setting, part, args.data, folder)
    from .report import draw, report

    records = load_records(part, folder)
    if not records:
        parser.error(f"{folder} has no results of this plan")
    try:
        report(records, args.baseline, args.rows)
    except ValueError as error:
        parser.error(f"{folder}: {error}")
    if part == runs and args.baseline == "lora":
        draw(records, folder)
    return 0


def read_plan(path: Path) -> tuple[Setting, list[Run]]:
    """The shared setting and all runs of a plan, in its order.

    Raises:
        ValueError: the plan names a method that it does not define.
    """
    plan = tomllib.loads(path.read_text(encoding="utf-8"))
    runs = []
    for block in plan["runs"]:
        for seed, r, lr, name in product(block["seeds"], block["r"], block["lr"], block["methods"]):
            if name not in plan["methods"]:
                raise ValueError(f"{path}: runs ask for the method {name!r}, defined are {sorted(plan['methods'])}")
            runs.append(Run(name, plan["methods"][name], r, lr, seed))
    return Setting(**plan["setting"]), list(dict.fromkeys(runs))


def do_runs(setting: Setting, runs: list[Run], data: Path, folder: Path) -> int:
    """Do every run that has no result yet and that no other process is at."""
    folder.mkdir(parents=True, exist_ok=True)
    bench = None
    for run in runs:
        path = folder / f"{run.id}.json"
        with claimed(path.with_suffix(".lock")) as mine:
            if not mine or is_done(path, run, setting):
                continue
            bench = bench or Bench(setting, data)
            record = bench.measure(run)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(record), encoding="utf-8")
            os.replace(temporary, path)
            found = record.get("validation", {"nll": float("nan")})
            print(f"{run.id}: nll {found['nll']:.4f}, {record['train_seconds']:.0f} s", flush=True)
    return 0


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """True while this process alone holds the lock; it ends with the process, however that ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


def is_done(path: Path, run: Run, setting: Setting) -> bool:
    """Whether the run's result is there.

    Raises:
        ValueError: the result was made with other options of the method of this name, or in another setting.
    """
    if not path.exists():
        return False
    record = json.loads(path.read_text(encoding="utf-8"))
    found = record["run"]["method"]
    if found != run.method:
        raise ValueError(f"{path} was made with {found}, the plan now says {run.method}: rename the method")
    if Setting(**record["setting"]) != setting:
        raise ValueError(f"{path} was made in {record['setting']}, the plan now says {vars(setting)}: rename the plan")
    return True


def load_records(runs: list[Run], folder: Path) -> list[dict[str, Any]]:
    """The records of the runs that are done, in the plan's order."""
    paths = [folder / f"{run.id}.json" for run in runs]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


if __name__ == "__main__":
    sys.exit(main())
