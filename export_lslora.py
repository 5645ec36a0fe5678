#!/usr/bin/env python3
"""Turn a trained LS-LoRA adapter into a plain LoRA adapter, for servers that know no spline.

Every layer's update is replaced by the linear one that is nearest over the rows of --dataset (`lslora.export`). How
near that is, and with --eval_dataset what it costs in answers, is printed and kept in OUTPUT/export.json. Where the
error of a layer is above --tolerance nothing is written. The result loads with peft alone.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm

from eval_lslora import base_name, check_questions, load_model, positive
from lslora.base_model import BaseModel
from lslora.config_file import read_object
from lslora.data import Example, Row, are_conversations, load_examples, load_rows
from lslora.evaluation import evaluate
from lslora.export import export_lora, observe_updates
from lslora.files import write_whole
from lslora.progress import bars_hidden, hide_library_bars, hide_library_warnings, print_any_text
from lslora.prompts import example_ids
from lslora.scoring import compare, format_comparison, format_table, summarize

WORST = 5  # layers shown
EXPORT = "export.json"


def main(arguments: list[str] | None = None) -> int:
    """Export the adapter; 0 when it is written, 2 when it cannot be, 130 after Ctrl-C."""
    args = parser().parse_args(arguments)
    print_any_text()
    if args.quiet:
        hide_library_warnings()
    try:
        examples = load_examples(args.dataset, chat_template=args.chat_template)[: args.rows]
        args.chat_template = are_conversations(examples)  # the evaluation's rows are asked as those to fit on
        eval_rows = load_rows(args.eval_dataset) if args.eval_dataset else []
        name = base_name(args.adapter, args.model_name)
        check_output(args.output)
        base = BaseModel(name)
        check_lengths(base, examples, str(args.dataset))
        check_questions(
            base,
            eval_rows,
            chat_template=args.chat_template,
            place=lambda index: f"{args.eval_dataset}: row {index + 1}",
        )
        results = export(args, base, examples, eval_rows)
    except (OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    if not args.quiet:
        report(results)
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="the trained LS-LoRA adapter")
    parser.add_argument("--dataset", type=Path, required=True, metavar="FILE", help="what to fit on (JSON or JSONL)")
    parser.add_argument("--chat_template", action="store_true", help="write instructions as the tokenizer's chat does")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the plain adapter goes")
    parser.add_argument("--model_name", metavar="NAME", help="base model; by default the one the adapter names")
    parser.add_argument("--rows", type=positive, default=200, metavar="N", help="fit on its first N rows")
    parser.add_argument("--rank", type=positive, metavar="R", help="of the plain adapter; by default the same")
    parser.add_argument("--tolerance", type=tolerance, default=0.1, help="largest relative error of a layer's update")
    parser.add_argument("--eval_dataset", type=Path, metavar="FILE", help="rows to answer before and after")
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no tables, only errors")
    return parser


def tolerance(text: str) -> float:
    number = float(text)
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {number}")
    return number


def check_output(folder: Path) -> None:
    """ValueError for a folder with a trained adapter, the one to export or another: it would be gone."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    if read_object(path).get("peft_type") == "LSLORA" or not (folder / EXPORT).is_file():
        raise ValueError(
            f"--output must be a new folder or that of an earlier export, since the adapter in it would be lost, "
            f"got {folder}"
        )


def check_lengths(base: BaseModel, examples: list[Example], dataset: str) -> None:
    """ValueError for an example that is longer than the model has positions for."""
    if base.positions is None:
        return
    for number, example in enumerate(examples, start=1):
        if (length := len(example_ids(base.tokenizer, example))) > base.positions:
            limit = f"at most the model's {base.positions} tokens"
            raise ValueError(f"{dataset}: row {number} must have {limit}, got {length}")


def export(args: argparse.Namespace, base: BaseModel, examples: list[Example], eval_rows: list[Row]) -> dict[str, Any]:
    """Write the adapter and `export.json`; what that holds."""
    if bars_hidden(args.quiet):
        hide_library_bars()
    model, tokenizer = load_model(base, args.adapter, "auto"), base.tokenizer
    model.eval()
    with observe_updates(model, rank=args.rank) as moments, torch.inference_mode():
        for example in tqdm(examples, desc="Calibrating", unit="row", disable=bars_hidden(args.quiet)):
            model(input_ids=torch.tensor([example_ids(tokenizer, example)], device=model.device))
    errors = export_lora(model, moments, args.output, rank=args.rank, tolerance=args.tolerance)
    results: dict[str, Any] = {
        "adapter": str(args.adapter),
        "base": base.name,
        "calibration": {"dataset": str(args.dataset), "rows": len(examples)},
        "tolerance": args.tolerance,
        "errors": errors,
    }
    write_results(args.output, results)
    if eval_rows:
        before = answers(model, tokenizer, eval_rows, args, "LS-LoRA")
        plain = PeftModel.from_pretrained(model.unload(), args.output).eval()
        after = answers(plain, tokenizer, eval_rows, args, "plain LoRA")
        results["evaluation"] = {"lslora": summarize(before), "plain": summarize(after)}
        results["comparison"] = compare(before, after)
        write_results(args.output, results)
    return results


def write_results(folder: Path, results: dict[str, Any]) -> None:
    write_whole(folder / EXPORT, json.dumps(results, ensure_ascii=False, indent=1) + "\n")


def answers(model: Any, tokenizer: Any, rows: list[Row], args: argparse.Namespace, name: str) -> Any:
    with tqdm(total=len(rows), desc=f"Answering ({name})", unit="row", disable=bars_hidden(args.quiet)) as bar:
        return evaluate(model, tokenizer, rows, chat_template=args.chat_template, on_prediction=lambda _: bar.update())


def report(results: dict[str, Any]) -> None:
    errors = results["errors"]
    total = math.sqrt(math.fsum(error**2 for error in errors.values()) / len(errors))
    print(f"\nRelative error of the linear updates: {total:.4f} over {len(errors)} layers; the largest")
    for name in sorted(errors, key=errors.__getitem__, reverse=True)[:WORST]:
        print(f"  {errors[name]:.4f}  {name.removeprefix('base_model.model.')}")
    if "evaluation" in results:
        print("\nAccuracy in per cent, with 95 % intervals\n")
        print(format_table(results["evaluation"]))
        print("\nPlain minus LS-LoRA in percentage points, paired, with 95 % intervals\n")
        print(format_comparison(results["comparison"]))


if __name__ == "__main__":
    sys.exit(main())
