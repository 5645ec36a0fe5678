"""Which measured rows ask what a training row asks, and the differences between methods without them.

    python -m benchmarks.overlap --plan benchmarks/plans/NAME.toml --data FOLDER

A set of word problems repeats itself: the same question, or the same one with other numbers. That helps every method
alike, but a difference should not rest on it. Questions are compared in lower case, words and digits alone.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer

from .quality import RESULTS, load_records, read_plan
from .report import ALL, ROWS, Record, difference_table, group
from .runs import Setting, model_name
from .tasks import IGNORED, Example, load_examples


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True, help="TOML file with the matrix of runs")
    parser.add_argument("--data", type=Path, default=Path("."), help="folder that the plan's paths start from")
    parser.add_argument("--results", type=Path, default=RESULTS, help="holds a folder for each plan")
    parser.add_argument("--baseline", default="lora", help="method that the others are compared with")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these, all by default")
    parser.add_argument("--rows", choices=ROWS, default=ALL, help="of the rows that are left")
    args = parser.parse_args(argv)
    setting, runs = read_plan(args.plan)
    part = [run for run in runs if not args.seeds or run.seed in args.seeds]
    train, measured = questions(setting, args.data)
    verbatim, but_for_numbers = repeated(train, measured), repeated(*map(without_numbers, (train, measured)))
    console = Console(width=150)
    console.print(
        f"of {len(measured)} measured rows {len(verbatim)} ask what one of {len(train)} training rows asks, "
        f"{len(but_for_numbers)} but for the numbers; without these:"
    )
    records = [without(record, but_for_numbers) for record in load_records(part, args.results / args.plan.stem)]
    console.print(difference_table(group(records), "nll", args.baseline, args.rows))
    return 0


def questions(setting: Setting, data: Path) -> tuple[list[str], list[str]]:
    """What the rows of a plan ask, of those that it trains on and of those that it measures, as the model reads it."""
    tokenizer = AutoTokenizer.from_pretrained(model_name(setting, data))
    asked: list[list[str]] = []
    for path, most in ((setting.train, setting.train_rows), (setting.validation, setting.validation_rows)):
        examples = load_examples(data / path, tokenizer, setting.max_tokens, most, setting.cloze)
        asked.append([plain(str(tokenizer.decode(prompt_of(example)))) for example in examples])
    return asked[0], asked[1]


def prompt_of(example: Example) -> Any:
    """The tokens of an example up to the first that is learned."""
    return example["input_ids"][: int((example["targets"] == IGNORED).sum()) + 1]


def plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z]+|[0-9]+", text.lower()))


def without_numbers(texts: list[str]) -> list[str]:
    return [re.sub(r"[0-9]+", "#", text) for text in texts]


def repeated(train: list[str], measured: list[str]) -> set[int]:
    """The measured texts that are among the training ones, by their index."""
    known = set(train)
    return {index for index, text in enumerate(measured) if text in known}


def without(record: Record, rows: set[int]) -> Record:
    """The record in which these rows have no token, and so no part in any nll."""
    if record["diverged"]:
        return record
    found = record["validation"]
    kept = {
        name: [0 if i in rows else value for i, value in enumerate(found[name])] for name in ("row_nll", "row_tokens")
    }
    return record | {"validation": found | kept}


if __name__ == "__main__":
    raise SystemExit(main())
