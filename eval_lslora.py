#!/usr/bin/env python3
"""Measure how often a model answers right, with an adapter, without, or both side by side.

Every prediction is written to OUTPUT.partial.jsonl as soon as it is there; started again with the same settings, an
interrupted evaluation goes on where it stopped. Memory does not grow with the number of rows: they are read as they
are needed. Read the results again with calculate_score.py.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftConfig, PeftModel
from tqdm.auto import tqdm

from lslora.adapter_files import check_adapter_files
from lslora.answers import SCORERS
from lslora.base_model import BaseModel
from lslora.data import Row, RowFile
from lslora.evaluation import by_index, check_rows, in_row_order, predict
from lslora.files import sha256, write_json_whole
from lslora.partial_results import PartialResults
from lslora.progress import bars_hidden, hide_library_bars, hide_library_warnings, print_any_text
from lslora.scoring import Prediction, compare, format_comparison, format_table, summarize

T = TypeVar("T")
ADAPTER, BASE = "adapter", "base"
BEGINNING = b'{\n"settings": {\n"model_name": '  # of results, as they are written
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def main(arguments: list[str] | None = None) -> int:
    """Run the evaluation; 0 when it is done, 1 when it cannot be written, 2 when arguments or data are not usable."""
    args = parse_arguments(arguments)
    print_any_text()
    if args.quiet:
        hide_library_warnings()
    try:
        questions = Questions(args.dataset, args.limit, args.seed)
        if args.output.is_dir():
            raise ValueError(f"--output must be a file, got the folder {args.output}")
        if is_foreign(args.output):
            raise ValueError(f"--output must be a new file or earlier results, or it would be lost, got {args.output}")
        settings = settings_of(args)
        base = BaseModel(settings["model_name"])
        check_questions(base, questions, args.scorer, chat_template=args.chat_template, place=questions.place)
        partial = PartialResults(partial_path(args.output), settings)
    except (OSError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        with partial:
            results = run(args, settings, base, questions, partial)
    except OSError as error:  # the disk is full, say; what was answered until then is kept
        print(f"{args.output} could not be written: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"{error}; what was answered is kept in {partial.path}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; what was answered is kept in {partial.path}: start again", file=sys.stderr)
        return 128 + signal.SIGINT
    if results is None:
        return 2
    partial.delete()
    if not args.quiet:
        report(results)
    return 0


def run(
    args: argparse.Namespace, settings: dict[str, Any], base: BaseModel, questions: Questions, partial: PartialResults
) -> dict[str, Any] | None:
    """Load the model, let it answer and write the results; None, with the reason told, if it cannot be loaded."""
    if hidden := bars_hidden(args.quiet):
        hide_library_bars()
    try:
        model = load_model(base, args.adapter, args.dtype)
    except (OSError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return None
    answer(args, model, base.tokenizer, questions, partial, hidden)
    results = results_of(settings, partial)
    write_json_whole(args.output, results)
    return results


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="adapter folder; without it the base is measured")
    parser.add_argument("--dataset", type=Path, nargs="+", required=True, metavar="FILE", help="rows (JSON or JSONL)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where the results go (JSON)")
    parser.add_argument("--model_name", metavar="NAME", help="base model; by default the one the adapter names")
    parser.add_argument("--base", action="store_true", help="measure the base as well and compare")
    parser.add_argument("--scorer", choices=SCORERS, default="auto", help="auto: likelihood of the options, if any")
    parser.add_argument("--chat_template", action="store_true", help="ask as the tokenizer's chat does")
    parser.add_argument("--batch_size", type=positive, default=16, metavar="ROWS")
    parser.add_argument("--max_new_tokens", type=positive, default=256, metavar="TOKENS", help="for generated answers")
    parser.add_argument("--limit", type=positive, metavar="N", help="only N rows of each file, drawn with --seed")
    parser.add_argument("--seed", type=int, default=0, help="for --limit and the intervals of differences")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: as in the checkpoint",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no tables, only errors")
    return parser


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    known = parser()
    args = known.parse_args(arguments)
    if not (args.adapter or args.model_name):
        known.error("one of --adapter and --model_name is needed")
    if args.base and not args.adapter:
        known.error("--base compares with an adapter: give one with --adapter")
    return args


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the predictions depend on."""
    model_name = base_name(args.adapter, args.model_name)
    weights = [path for name in ADAPTER_FILES if args.adapter and (path := args.adapter / name).is_file()]
    return {
        "model_name": model_name,
        "base_files": base_files(model_name),
        "adapter": str(args.adapter) if args.adapter else None,
        "adapter_sha256": {path.name: sha256(path) for path in weights} if args.adapter else None,
        "datasets": [{"path": str(path), "sha256": sha256(path)} for path in args.dataset],
        **{name: getattr(args, name) for name in ("base", "scorer", "chat_template", "batch_size", "max_new_tokens")},
        **{name: getattr(args, name) for name in ("limit", "seed", "dtype")},
    }


def base_files(model_name: str) -> dict[str, list[int]] | None:
    """Size and time, in nanoseconds, of the files of a base model in a folder of one's own; None for other names."""
    folder = Path(model_name)
    if not folder.is_dir():
        return None
    found = ((path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file())
    return {name: [state.st_size, state.st_mtime_ns] for name, state in found}


def base_name(adapter: Path | None, given: str | None) -> str:
    """The base model that was given, or else the one that the adapter names; ValueError without a usable adapter."""
    named = None
    if adapter:
        config = adapter / ADAPTER_FILES[0]
        if not config.is_file():
            raise ValueError(f"--adapter must be a folder with {ADAPTER_FILES[0]}, got {adapter}")
        named = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
        check_adapter_files(adapter)
    if not (given or named):
        raise ValueError(f"{adapter} does not name its base model: give it with --model_name")
    return str(given or named)


def check_questions(
    base: BaseModel,
    rows: Collection[Row],
    scorer: str = "auto",
    *,
    chat_template: bool,
    place: Callable[[int], str] = by_index,
) -> None:
    """ValueError, before the model is loaded, for rows that it cannot score or be asked with its chat template."""
    if chat_template and not base.tokenizer.chat_template:
        raise ValueError(f"--chat_template needs a tokenizer that has one, that of {base.name} has none")
    check_rows(base.tokenizer, rows, scorer, chat_template=chat_template, positions=base.positions, place=place)


class Questions:
    """The rows of all files, read from them whenever they are gone through; with a limit, so many drawn of each.

    A row without a task gets the file's name, or the folder's where that tells more, or both where files share a name.
    """

    def __init__(self, paths: list[Path], limit: int | None, seed: int) -> None:
        self.files, self.limit, self.seed = [RowFile(path) for path in paths], limit, seed

    def __len__(self) -> int:
        return sum(map(self._wanted, self.files))

    def __iter__(self) -> Iterator[Row]:
        names = task_names([file.path for file in self.files])
        for file, name in zip(self.files, names, strict=True):
            for row in drawn(file, self._wanted(file), self.seed):
                yield row | {"task": row["task"] or name}

    def place(self, index: int) -> str:
        """The file of the row with this index, and its number there, from 1."""
        for file in self.files:
            wanted = self._wanted(file)
            if index < wanted:
                numbers = drawn(range(1, len(file) + 1), wanted, self.seed)
                return f"{file.path}: row {next(islice(numbers, index, None))}"
            index -= wanted
        raise IndexError(f"there are {len(self)} rows")

    def _wanted(self, file: RowFile) -> int:
        return len(file) if self.limit is None else min(self.limit, len(file))


def task_names(paths: list[Path]) -> list[str]:
    """What the rows of each file are called that name no task."""
    folders = [path.resolve().parent.name for path in paths]
    names = [
        folder if path.stem in ("train", "validation", "test") else path.stem
        for path, folder in zip(paths, folders, strict=True)
    ]
    shared = {name for name in names if names.count(name) > 1}
    return [
        f"{folder}/{path.stem}" if name in shared else name
        for name, path, folder in zip(names, paths, folders, strict=True)
    ]


def drawn(rows: Collection[T], count: int, seed: int) -> Iterator[T]:
    """`count` of the rows in their order, any so many with the same probability: each if chance gives it a place."""
    rng = random.Random(seed)
    for row, left in zip(rows, range(len(rows), 0, -1), strict=True):
        if rng.random() * left < count:
            count -= 1
            yield row


def is_foreign(output: Path) -> bool:
    """Whether there is a file that is no result of this script: rows, an adapter's or a training's files, whatever."""
    if not output.exists():
        return False
    with output.open("rb") as file:
        return file.read(len(BEGINNING)) != BEGINNING


def partial_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial.jsonl")


def sides_of(settings: dict[str, Any]) -> list[str]:
    """Who answers, in this order: the adapter if there is one, the base without one or if asked for."""
    return [ADAPTER] * bool(settings["adapter"]) + [BASE] * (settings["base"] or not settings["adapter"])


def answer(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    questions: Questions,
    partial: PartialResults,
    hidden: bool,
) -> None:
    """Let every side answer what it has not answered yet."""
    for side in sides_of(vars(args)):
        context = model.disable_adapter() if args.adapter and side == BASE else nullcontext()
        known = partial.counts[side]
        with context, tqdm(total=len(questions), initial=known, desc=side, unit="row", disable=hidden) as bar:
            for prediction in predict(
                model,
                tokenizer,
                questions,
                scorer=args.scorer,
                chat_template=args.chat_template,
                batch_size=args.batch_size,
                max_new_tokens=args.max_new_tokens,
                known=partial.read(side),
            ):
                partial.add(side, prediction)
                bar.update()


def load_model(base: BaseModel, adapter: Path | None, dtype: str) -> Any:
    """The base model, on the GPU if there is one, with the adapter if one is given.

    Raises:
        ValueError: the base model's file was cut short, or the adapter is not one of this base model.
    """
    model = base.load(dtype=dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if adapter:
        try:
            model = PeftModel.from_pretrained(model, adapter)
        except RuntimeError as error:  # torch's word for tensors of other shapes
            raise ValueError(f"{adapter} does not fit the base model {base.name}: {error}") from error
    return model


def results_of(settings: dict[str, Any], partial: PartialResults) -> dict[str, Any]:
    """What the output file holds; its predictions are read as they are written."""

    def predictions(side: str) -> Iterator[Prediction]:
        return in_row_order(partial.read(side), settings["batch_size"])

    side, *other = sides_of(settings)
    results = {"settings": settings, "summary": summarize(predictions(side)), "predictions": predictions(side)}
    if other:
        results["base"] = {"summary": summarize(predictions(BASE)), "predictions": predictions(BASE)}
        results["comparison"] = compare(predictions(BASE), predictions(side), seed=settings["seed"])
    return results


def report(results: dict[str, Any]) -> None:
    side = ADAPTER if results["settings"]["adapter"] else BASE
    columns = {side: results["summary"]}
    if "base" in results:
        columns[BASE] = results["base"]["summary"]
    print("\nAccuracy in per cent, with 95 % intervals\n")
    print(format_table(columns))
    if "comparison" in results:
        print("\nAdapter minus base in percentage points, paired, with 95 % intervals\n")
        print(format_comparison(results["comparison"]))


if __name__ == "__main__":
    sys.exit(main())
