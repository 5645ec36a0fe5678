#!/usr/bin/env python3
"""Print accuracies from the results of eval_lslora.py; of two result files also how the second differs from the first,
of one with the base model's answers (--base) how the adapter differs from those.

Runs with Python alone: neither torch nor the package has to be installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import sys
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

ROW = ("index", "task", "answer")  # what two predictions of the same row share
FIELDS: dict[str, tuple[type, ...]] = {
    "index": (int,),
    "task": (str,),
    "answer": (str,),
    "prediction": (str, type(None)),
    "correct": (bool,),
}


def main(arguments: list[str] | None = None) -> int:
    """Print the scores; 0 when done, 2 when a file is not usable or two files hold different items."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="output of eval_lslora.py")
    paths = parser.parse_args(arguments).files
    scoring = load_scoring()
    if isinstance(sys.stdout, io.TextIOWrapper):  # which may have no characters for a task's name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sides = [read_sides(Path(path)) for path in paths]
        columns = {path: own for path, (own, *_) in zip(paths, sides, strict=True)}
        if len(paths) == 1 and (base := sides[0][1:]):
            columns["base" if paths[0] != "base" else "its base"] = base[0]
            title, comparison = "Adapter minus base", scoring.compare(base[0], sides[0][0])
        elif len(paths) == 2:
            title, comparison = "Second file minus first", scoring.compare(*(own for own, *_ in sides))
        else:
            title, comparison = "", None
        check_rows(columns)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print("Accuracy in per cent, with 95 % intervals\n")
    print(scoring.format_table({name: scoring.summarize(items) for name, items in columns.items()}))
    if comparison:
        print(f"\n{title} in percentage points, paired, with 95 % intervals\n")
        print(scoring.format_comparison(comparison))
    return 0


def check_rows(columns: dict[str, list[dict[str, Any]]]) -> None:
    """ValueError for columns of other rows than the first one's, beside which their accuracies would stand."""
    (first, expected), *others = columns.items()
    for path, items in others:
        for number, pair in enumerate(zip_longest(expected, items), start=1):
            one, other = (item and tuple(item[field] for field in ROW) for item in pair)
            if one != other:
                raise ValueError(
                    f"files must be of the same rows, but item {number} is {one} in {first} and {other} in {path}"
                )


def load_scoring() -> ModuleType:
    """The package's `scoring` module, read from its file: importing the package itself would import torch and peft."""
    path = Path(__file__).resolve().parent / "src" / "lslora" / "scoring.py"
    spec = importlib.util.spec_from_file_location("lslora_scoring", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot be loaded: {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_sides(path: Path) -> list[list[dict[str, Any]]]:
    """The predictions in a result file, and those of the base model if it has them, each by index.

    Raises:
        ValueError: the file cannot be read or is not what eval_lslora.py writes.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must be JSON in UTF-8: {error}") from error
    own = content if isinstance(content, dict) else {}
    return [checked(path, side) for side in (own, *([own["base"]] if "base" in own else []))]


def checked(path: Path, side: Any) -> list[dict[str, Any]]:
    """The predictions of one side, by index; ValueError for what eval_lslora.py does not write."""
    predictions = side.get("predictions") if isinstance(side, dict) else None
    if not isinstance(predictions, list) or not predictions:
        raise ValueError(f"{path}: must hold a list of predictions as eval_lslora.py writes it")
    for number, prediction in enumerate(predictions, start=1):
        for field, kinds in FIELDS.items():
            if not isinstance(prediction, dict) or not isinstance(prediction.get(field, ...), kinds):
                raise ValueError(f"{path}: prediction {number}: field '{field}' is missing or of the wrong type")
    return sorted(predictions, key=lambda prediction: prediction["index"])


if __name__ == "__main__":
    sys.exit(main())
