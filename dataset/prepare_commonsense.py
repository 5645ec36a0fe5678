"""Build the commonsense reasoning data of LLM-Adapters from the data sets' own pages on the Hugging Face hub.

    python dataset/prepare_commonsense.py --output_dir data/commonsense

Files written to the output directory, each a JSON array of rows:
    commonsense_train.json: the training splits of all tasks.
    commonsense_5k.json: 5,000 training rows drawn at random, or all of them where there are fewer.
    test/<task>.json: one file for each task. BoolQ, PIQA, SIQA, HellaSwag and WinoGrande have no public test labels;
        as in LLM-Adapters, their validation split is the test file.

Texts are kept as the hub has them, the marks such as `[header]` in HellaSwag included: so does LLM-Adapters.
WinoGrande is its largest training set (`winogrande_xl`), which LLM-Adapters joins with the smaller ones drawn from it.
"""

import argparse
import json
import os
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from commonsense_formats import TASKS, Row, choice_row, true_false_row
from tqdm import tqdm

SUBSET_ROWS = 5000

HubRow = Mapping[str, Any]


def boolq(row: HubRow) -> Row:
    """Convert a row with `question` and a Boolean `answer`."""
    if not isinstance(row["answer"], bool):
        raise TypeError(f"answer must be true or false, got {row['answer']!r}")
    return true_false_row("boolq", row["question"], row["answer"])


def piqa(row: HubRow) -> Row:
    """Convert a row with `goal`, `sol1`, `sol2` and the index of the right one as `label`."""
    return choice_row("piqa", row["goal"], [row["sol1"], row["sol2"]], int(row["label"]))


def siqa(row: HubRow) -> Row:
    """Convert a row with `context`, `question`, `answerA` to `answerC` and the number of the right one as `label`."""
    options = [row["answerA"], row["answerB"], row["answerC"]]
    return choice_row("siqa", f"{row['context']} {row['question']}", options, int(row["label"]) - 1)


def hellaswag(row: HubRow) -> Row:
    """Convert a row with `activity_label`, `ctx`, `endings` and the index of the right one as `label`, a string."""
    return choice_row("hellaswag", f"{row['activity_label']}: {row['ctx']}", row["endings"], int(row["label"]))


def winogrande(row: HubRow) -> Row:
    """Convert a row with `sentence`, `option1`, `option2` and the number of the right one as `answer`, a string."""
    return choice_row("winogrande", row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1)


def arc_easy(row: HubRow) -> Row:
    """Convert a row with `question`, `choices` and `answerKey`."""
    return _labelled_choice_row("arc_easy", row["question"], row)


def arc_challenge(row: HubRow) -> Row:
    """Convert a row with `question`, `choices` and `answerKey`."""
    return _labelled_choice_row("arc_challenge", row["question"], row)


def openbookqa(row: HubRow) -> Row:
    """Convert a row with `question_stem`, `choices` and `answerKey`."""
    return _labelled_choice_row("openbookqa", row["question_stem"], row)


def _labelled_choice_row(task: str, stem: str, row: HubRow) -> Row:
    """Find the right option by its label: `A` to `E` in most rows, `1` to `5` in some; not every row has four."""
    labels, key = row["choices"]["label"], row["answerKey"]
    if key not in labels:
        raise ValueError(f"answerKey must be one of the labels {labels}, got {key!r}")
    return choice_row(task, stem, row["choices"]["text"], labels.index(key))


class Source(NamedTuple):
    """Where a task is on the hub, and how its rows are converted."""

    hub_id: str
    config: str | None
    train_split: str
    test_split: str
    convert: Callable[[HubRow], Row]


SOURCES = {
    "boolq": Source("google/boolq", None, "train", "validation", boolq),
    # The original pages of PIQA and SIQA hold loading scripts, which `datasets` no longer runs; these are their rows.
    "piqa": Source("baber/piqa", None, "train", "validation", piqa),
    "siqa": Source("lighteval/siqa", None, "train", "validation", siqa),
    "hellaswag": Source("Rowan/hellaswag", None, "train", "validation", hellaswag),
    "winogrande": Source("allenai/winogrande", "winogrande_xl", "train", "validation", winogrande),
    "arc_easy": Source("allenai/ai2_arc", "ARC-Easy", "train", "test", arc_easy),
    "arc_challenge": Source("allenai/ai2_arc", "ARC-Challenge", "train", "test", arc_challenge),
    "openbookqa": Source("allenai/openbookqa", "main", "train", "test", openbookqa),
}


def convert_rows(task: str, hub_rows: Iterable[HubRow]) -> list[Row]:
    """Convert all rows of a split.

    Raises:
        ValueError: a row cannot be converted; the message names the task, the row (from 1) and the reason.
    """
    rows = []
    for number, hub_row in enumerate(tqdm(hub_rows, desc=task, unit="row"), start=1):
        try:
            rows.append(SOURCES[task].convert(hub_row))
        except KeyError as error:
            raise ValueError(f"{task}: row {number}: column {error} is missing") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{task}: row {number}: {error}") from error
    return rows


def write_json(path: Path, rows: list[Row]) -> None:
    """Write the rows so that the file is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    os.replace(unfinished, path)


def prepare(output_dir: Path, tasks: Iterable[str], seed: int) -> None:
    """Download the tasks and write the files."""
    from datasets import load_dataset

    train_rows: list[Row] = []
    for task in tasks:
        source = SOURCES[task]
        hub = load_dataset(source.hub_id, source.config)
        train_rows += convert_rows(task, hub[source.train_split])
        write_json(output_dir / "test" / f"{task}.json", convert_rows(task, hub[source.test_split]))
    write_json(output_dir / "commonsense_train.json", train_rows)
    subset = random.Random(seed).sample(train_rows, min(SUBSET_ROWS, len(train_rows)))
    write_json(output_dir / "commonsense_5k.json", subset)


def main() -> None:
    """Read the command line and build the files."""
    parser = argparse.ArgumentParser(description="Build the commonsense reasoning data of LLM-Adapters.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=42, help="of the draw of the 5,000 rows (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="default: all")
    arguments = parser.parse_args()
    prepare(arguments.output_dir, arguments.tasks, arguments.seed)


if __name__ == "__main__":
    main()
