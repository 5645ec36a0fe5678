"""Rows of instruction data: reading, validation, and the one place that turns a row into text.

A row is a JSON object with the string fields `instruction`, `input`, `output`, `answer` and, optionally, `task` (the
layout of the LLM-Adapters collection, https://github.com/AGI-Edgerunners/LLM-Adapters).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

Row = dict[str, str]

REQUIRED_FIELDS = ("instruction", "output")
OPTIONAL_FIELDS = ("input", "answer", "task")
MAX_SHOWN_PROBLEMS = 10


class PromptCompletion(TypedDict):
    """What a language model reads (`prompt`) and what it is to answer (`completion`)."""

    prompt: str
    completion: str


class DataError(ValueError):
    """A data file that cannot be used; the message names the file, the row and what is wrong with it."""


def load_rows(path: str | Path) -> list[Row]:
    """Read a JSON array or a JSONL file of rows and check every one of them.

    Args:
        path: UTF-8 file, with or without a byte order mark. A file whose first character is `[` is read as one JSON
            array, any other as JSON Lines (one object a line; blank lines are skipped).

    Returns:
        The rows in file order. Each has `instruction`, `input`, `output`, `answer` and `task` as strings; the optional
        ones are `""` where the file leaves them out. Unknown fields are dropped.

    Raises:
        DataError: the file is missing, is no text, holds no row, or has rows that are not valid. All bad rows are
            counted and the first ten are named: by line in a JSONL file, by position (from 1) in a JSON array.
    """
    path = Path(path)
    rows: list[Row] = []
    problems: list[str] = []
    for where, value in _parse(path):
        problem = value if isinstance(value, _Unparsed) else _problem(value)
        if problem:
            problems.append(f"  {where}: {problem}")
        else:
            rows.append({field: value.get(field) or "" for field in REQUIRED_FIELDS + OPTIONAL_FIELDS})
    if problems:
        shown = "\n".join(problems[:MAX_SHOWN_PROBLEMS])
        rest = len(problems) - MAX_SHOWN_PROBLEMS
        raise DataError(f"{path}: {len(problems)} bad row(s)\n{shown}" + (f"\n  and {rest} more" if rest > 0 else ""))
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def to_prompt_completion(row: Row) -> PromptCompletion:
    """Turn a row into the text a model is trained on and asked with: the headings of Alpaca, without its preamble.

    The sentence that Alpaca and LLM-Adapters put first ("Below is an instruction ...") is the same in every row, says
    nothing a fine-tuned model needs, and costs a third of the tokens of a short one.

    Args:
        row: A row as `load_rows` returns it; `input` may be missing or empty.

    Returns:
        `prompt`, which ends in a line break after `### Response:`, and `completion`, the row's `output` as it is. The
        end-of-sequence token is the tokenizer's business and is not part of either.
    """
    context = f"### Input:\n{row['input']}\n\n" if row.get("input") else ""
    prompt = f"### Instruction:\n{row['instruction']}\n\n{context}### Response:\n"
    return {"prompt": prompt, "completion": row["output"]}


class _Unparsed(str):
    """Why a piece of a file is no JSON."""


def _parse(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) for every row of the file; the value is `_Unparsed` where it is no JSON."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: must be UTF-8 text, but byte {error.start} is not: {error.reason}") from error
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: line {error.lineno}: no valid JSON: {error.msg}") from error
        yield from ((f"row {number}", value) for number, value in enumerate(values, start=1))
        return
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                yield f"line {number}", _Unparsed(f"no valid JSON: {error.msg} at column {error.colno}")


def _problem(value: Any) -> str | None:
    """What is wrong with a parsed row, or None."""
    if not isinstance(value, dict):
        return f"must be a JSON object, got {type(value).__name__}"
    for field in REQUIRED_FIELDS:
        if field not in value:
            return f"field '{field}' is missing"
        if not isinstance(value[field], str):
            return f"field '{field}' must be a string, got {type(value[field]).__name__}"
        if not value[field].strip():
            return f"field '{field}' is empty"
    for field in OPTIONAL_FIELDS:
        if not isinstance(value.get(field, ""), str):
            return f"field '{field}' must be a string, got {type(value[field]).__name__}"
    return None
