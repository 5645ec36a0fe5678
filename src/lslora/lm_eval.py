"""LS-LoRA in lm-evaluation-harness: its command line with the method known to peft, and our rows as one of its tasks.

`python -m lslora.lm_eval ...` takes all arguments of `lm_eval ...`. lm-evaluation-harness loads adapters with peft, so
an LS-LoRA adapter needs nothing but that lslora is imported before.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from .answers import option_completion, options_of
from .data import Row, to_prompt_completion
from .evaluation import with_scorers
from .files import write_whole


def write_task(rows: Sequence[Row], folder: str | Path, name: str) -> Path:
    """Write rows as a task for lm-evaluation-harness that asks what `eval_lslora.py` asks, without `--chat_template`.

    Its `acc` is the accuracy by likelihood: a row counts as right when the completion with the right option is the
    likeliest of all options' completions, by the sum over its tokens, not divided by its length.

    Args:
        rows: Rows with options, as `load_rows` returns them; the number of options may differ from row to row.
        folder: Where `NAME.yaml` (the task) and `NAME.jsonl` (what is asked) go, for `--include_path`; made if it is
            not there. The former names the latter by its absolute path, so write the task again to move it.
        name: The task's name for `--tasks`: letters, digits, `_` and `-`.

    Returns:
        The path of `NAME.yaml`.

    Raises:
        ValueError: there are no rows, a row cannot be scored by likelihood (the message gives its index), or the name
            has other characters.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"name must be made of letters, digits, _ and -, got {name!r}")
    if not rows:
        raise ValueError("rows must hold at least one row, got none")
    lines = [json.dumps(_question(row)) + "\n" for row, _ in with_scorers(rows, "likelihood")]
    folder = Path(folder).resolve()
    questions, task = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    write_whole(questions, "".join(lines))
    # JSON is YAML. All texts are columns, which lm-evaluation-harness takes as they are; templates it would render.
    write_whole(task, json.dumps(_task(name, questions), ensure_ascii=False, indent=2) + "\n")
    return task


def _question(row: Row) -> dict[str, str | int | list[str]]:
    options = options_of(row) or ()
    return {
        "prompt": to_prompt_completion(row)["prompt"],
        "choices": [option_completion(row, option) for option in options],
        "target": options.index(row["answer"]),
    }


def _task(name: str, questions: Path) -> dict[str, object]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "target",
        "target_delimiter": "",  # the prompt ends in a line break of its own
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def main() -> None:
    """Run the command line of lm-evaluation-harness; ends with status 1 and one sentence where it is not installed."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        sys.exit("python -m lslora.lm_eval needs lm-evaluation-harness: pip install 'lslora[eval]' (or lm-eval)")
    cli_evaluate()


if __name__ == "__main__":
    main()
