#!/usr/bin/env python3
"""Measure how often a model answers right, with an adapter, without, or both side by side.

Every prediction is written to OUTPUT.partial.jsonl as soon as it is there; started again with the same settings, an
interrupted evaluation goes on where it stopped. Read the results again with calculate_score.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
from contextlib import nullcontext
from io import BufferedRandom
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lslora.adapter_files import check_adapter_files
from lslora.answers import SCORERS
from lslora.data import Row, load_rows
from lslora.embedded import resolve_model_name
from lslora.evaluation import check_rows, evaluate
from lslora.files import write_whole
from lslora.progress import bars_hidden, hide_library_bars
from lslora.scoring import Prediction, compare, format_comparison, format_table, summarize

ADAPTER, BASE = "adapter", "base"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def main(arguments: list[str] | None = None) -> int:
    """Run the evaluation; 0 when it is done, 1 when it cannot be written, 2 when arguments or data are not usable."""
    args = parse_arguments(arguments)
    try:
        rows = read_rows(args.dataset, args.limit, args.seed)
        settings = settings_of(args)
        check_base(settings["model_name"])
        check_questions(settings["model_name"], rows, args.scorer, chat_template=args.chat_template)
        file, known = open_partial(partial_path(args.output), settings)
    except (OSError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if hidden := bars_hidden(args.quiet):
        hide_library_bars()
    try:
        model, tokenizer = load_model(settings["model_name"], args.adapter, args.dtype)
    except (OSError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        file.close()
        if not any(known.values()):
            partial_path(args.output).unlink()
        return 2
    try:
        with file:
            predictions = predict(args, model, tokenizer, rows, known, file, hidden)
        results = summaries(settings, predictions, args.seed)
        write_whole(args.output, json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:  # the disk is full, say; what was answered until then is kept
        print(f"{args.output} could not be written: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; what was answered is kept in {partial_path(args.output)}: start again", file=sys.stderr)
        return 128 + signal.SIGINT
    partial_path(args.output).unlink()
    if not args.quiet:
        report(results)
    return 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
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
    args = parser.parse_args(arguments)
    if not (args.adapter or args.model_name):
        parser.error("one of --adapter and --model_name is needed")
    if args.base and not args.adapter:
        parser.error("--base compares with an adapter: give one with --adapter")
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
        "adapter": str(args.adapter) if args.adapter else None,
        "adapter_sha256": sha256(weights) if args.adapter else None,
        "datasets": [{"path": str(path), "sha256": sha256([path])} for path in args.dataset],
        **{name: getattr(args, name) for name in ("base", "scorer", "chat_template", "batch_size", "max_new_tokens")},
        **{name: getattr(args, name) for name in ("limit", "seed", "dtype")},
    }


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


def check_base(model_name: str) -> None:
    """Raise OSError or ValueError if there is no such base model, or none that transformers itself can make."""
    AutoConfig.from_pretrained(resolve_model_name(model_name), trust_remote_code=False)


def check_questions(model_name: str, rows: list[Row], scorer: str = "auto", *, chat_template: bool) -> None:
    """ValueError, before the model is loaded, for rows that cannot be scored or asked with its chat template."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_name(model_name), trust_remote_code=False)
    if chat_template and not tokenizer.chat_template:
        raise ValueError(f"--chat_template needs a tokenizer that has one, that of {model_name} has none")
    check_rows(tokenizer, rows, scorer, chat_template=chat_template)


def sha256(paths: list[Path]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths)).hexdigest()


def read_rows(paths: list[Path], limit: int | None, seed: int) -> list[Row]:
    """The rows of all files; a row without a task gets the file's name, or the folder's where that tells more."""
    rows: list[Row] = []
    for path in paths:
        stem = path.stem if path.stem not in ("train", "validation", "test") else path.resolve().parent.name
        found = [row | {"task": row["task"] or stem} for row in load_rows(path)]
        if limit is not None and limit < len(found):
            found = [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), limit))]
        rows += found
    return rows


def partial_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial.jsonl")


def open_partial(path: Path, settings: dict[str, Any]) -> tuple[BufferedRandom, dict[str, list[Prediction]]]:
    """Open the partial results for writing on, with the predictions they hold.

    Raises:
        ValueError: the file is of another evaluation or none of ours.
    """
    known: dict[str, list[Prediction]] = {ADAPTER: [], BASE: []}
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # a line without its end was cut short
    remedy = f"delete {path} or choose another --output"
    try:
        header, *entries = [json.loads(line) for line in lines] or [settings]
        different = [name for name in settings if header[name] != settings[name]]
        for entry in entries:
            known[entry["side"]].append(entry["prediction"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no partial result of this script: {remedy}") from error
    if different:
        was = "; ".join(f"{name} was {header[name]!r} and is {settings[name]!r}" for name in different)
        raise ValueError(f"{path} holds results of other settings ({was}): {remedy}")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(sum(len(line) + 1 for line in lines))
    file.seek(0, os.SEEK_END)
    if not lines:
        write_line(file, settings)
    return file, known


def write_line(file: BufferedRandom, value: dict[str, Any]) -> None:
    file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
    file.flush()


def predict(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    known: dict[str, list[Prediction]],
    file: BufferedRandom,
    hidden: bool,
) -> dict[str, list[Prediction]]:
    """Let the model answer: with the adapter if there is one, without if asked for, in this order."""
    sides: dict[str, Any] = {ADAPTER if args.adapter else BASE: nullcontext()}
    if args.base:
        sides[BASE] = model.disable_adapter()
    predictions = {}
    for side, context in sides.items():
        with context, tqdm(total=len(rows), initial=len(known[side]), desc=side, unit="row", disable=hidden) as bar:

            def keep(prediction: Prediction, side: str = side, bar: Any = bar) -> None:
                write_line(file, {"side": side, "prediction": prediction})
                bar.update()

            predictions[side] = evaluate(
                model,
                tokenizer,
                rows,
                scorer=args.scorer,
                chat_template=args.chat_template,
                batch_size=args.batch_size,
                max_new_tokens=args.max_new_tokens,
                known=known[side],
                on_prediction=keep,
            )
    return predictions


def load_model(model_name: str, adapter: Path | None, dtype: str) -> tuple[Any, Any]:
    """The base model, on the GPU if there is one, with the adapter if one is given; and the base's tokenizer."""
    name = resolve_model_name(model_name)
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def summaries(settings: dict[str, Any], predictions: dict[str, list[Prediction]], seed: int) -> dict[str, Any]:
    """What the output file holds."""
    main_side = next(iter(predictions))
    results = {
        "settings": settings,
        "summary": summarize(predictions[main_side]),
        "predictions": predictions[main_side],
    }
    if len(predictions) > 1:
        results["base"] = {"summary": summarize(predictions[BASE]), "predictions": predictions[BASE]}
        results["comparison"] = compare(predictions[BASE], predictions[main_side], seed=seed)
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
