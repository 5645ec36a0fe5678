"""Bad data files through the loaders: `python -m tests.torture data --fuzzed 10000 --seed 0`.

Ends with status 1 where a loader raises anything but DataError, does not come back, or takes what is not valid.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .data_cases import CASES, Case
from .data_check import LOADERS, Verdict, judge
from .data_mutations import fuzzed

KINDS = ("refused", "accepted", "traceback", "silent")
SECONDS = 20


class Hung(BaseException):
    """A loader that does not come back; no `Exception`, so that nobody takes it for an error of the file."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture data", description=__doc__)
    parser.add_argument("--fuzzed", type=int, default=1000, help="how many fuzzed files, besides the hand-made ones")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with TemporaryDirectory() as folder:
        tables = {
            "hand-made": count(check_case(case, Path(folder)) for case in CASES),
            "fuzzed": count(check_fuzzed(f"{args.seed}-{number}", Path(folder)) for number in range(args.fuzzed)),
        }
    print(f"{'':32}{'cases':>8}" + "".join(f"{kind:>11}" for kind in KINDS))
    for origin, table in tables.items():
        for name, found in table.items():
            print(f"{origin + ', ' + name:32}{found.total():>8}" + "".join(f"{found[kind]:>11}" for kind in KINDS))
    return int(any(found["traceback"] + found["silent"] for table in tables.values() for found in table.values()))


def count(results: Iterator[tuple[str, dict[str, Verdict]]]) -> dict[str, Counter[str]]:
    """For each loader how often it did what; what must not be is printed."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in LOADERS}
    for case, verdicts in results:
        for name, verdict in verdicts.items():
            counts[name][verdict.kind] += 1
            if verdict.kind in ("traceback", "silent"):
                print(f"{name}: {case}: {verdict.kind}: {verdict.message}", file=sys.stderr)
    return counts


def check_case(case: Case, folder: Path) -> tuple[str, dict[str, Verdict]]:
    """All loaders on a hand-made file, which none must accept; `load_examples` must say the words."""
    path = fresh(folder)
    case.make(path)
    verdicts = judge_all(path)
    for name, verdict in verdicts.items():
        if verdict.kind == "accepted":
            verdicts[name] = Verdict("silent", "accepted")
    said = verdicts["load_examples"]
    if said.kind == "refused" and case.words not in said.message:
        verdicts["load_examples"] = Verdict("traceback", f"must say {case.words!r}, says {said.message!r}")
    return case.name, verdicts


def check_fuzzed(seed: str, folder: Path) -> tuple[str, dict[str, Verdict]]:
    path = fresh(folder)
    path.write_bytes(fuzzed(seed))
    return f"seed {seed}", judge_all(path)


def fresh(folder: Path) -> Path:
    """A path at which nothing is."""
    path = folder / "rows"
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        path.rmdir()
    return path


def judge_all(path: Path) -> dict[str, Verdict]:
    return {name: timed(loader, path) for name, loader in LOADERS.items()}


def timed(loader: Callable[[Path], list[Any]], path: Path) -> Verdict:
    try:
        with time_limit(SECONDS):
            return judge(loader, path)
    except Hung:
        return Verdict("traceback", f"no end after {SECONDS} seconds")


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
