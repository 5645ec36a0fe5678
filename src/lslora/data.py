"""Data to train on and to ask: validation, and the one place that turns a row into text or messages.

A row is a JSON object with the string fields `instruction`, `input`, `output`, `answer` and, optionally, `task` (the
layout of the LLM-Adapters collection, https://github.com/AGI-Edgerunners/LLM-Adapters).
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, final

from .answers import answer_problem
from .json_rows import DataError, Unparsed, read_values

Row = dict[str, str]

REQUIRED_FIELDS = ("instruction", "output")
OPTIONAL_FIELDS = ("input", "answer", "task")
# What a conversation may have for a model that calls tools, and is not written for it here.
OF_TOOLS = ("tools", "functions", "tool_calls", "function_call")
MAX_SHOWN_PROBLEMS = 10
MAX_SHOWN_CHARACTERS = 300


_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of a surrogate pair


@final
class PromptCompletion(TypedDict):
    """What a language model reads (`prompt`) and what it is to answer (`completion`)."""

    prompt: str
    completion: str


@final
class Conversation(TypedDict):
    """The messages a language model reads (`prompt`) and the one it is to answer with (`completion`).

    A message has a `role` (`system`, `user`, `assistant`, …) and a `content`.
    """

    prompt: list[dict[str, str]]
    completion: list[dict[str, str]]


@final
class Text(TypedDict):
    """A text without a question and an answer."""

    text: str


Example: TypeAlias = PromptCompletion | Conversation | Text


def load_rows(path: str | Path) -> list[Row]:
    """Read a JSON array or a JSONL file of instruction rows and check every one of them.

    Args:
        path: See `lslora.json_rows.read_values`: one JSON array, or JSON Lines (one object a line).

    Returns:
        The rows in file order. Each has `instruction`, `input`, `output`, `answer` and `task` as strings; the optional
        ones are `""` where the file leaves them out. Unknown fields are dropped.

    Raises:
        DataError: the file is missing, is no text, holds no row, or has rows that are not valid: no JSON, too long,
            with fields that are missing, empty or no text, or whose answer is none of the options that the instruction
            names or not the one that the output gives. All bad rows are counted and the first ten are named: by line
            in a JSONL file, by position (from 1) in a JSON array.
    """
    return [_row(value) for value in _checked(Path(path), read_values(Path(path)), _row_problem)]


class RowFile:
    """The rows of a file, not held but read again each time they are gone through; checked when this is made.

    Args:
        path: As for `load_rows`.

    Raises:
        DataError: as `load_rows` does; and while the rows are gone through, if the file is no longer what it was.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._count = sum(1 for _ in self._read())

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Row]:
        found = 0
        for row in self._read():
            found += 1
            if found <= self._count:
                yield row
        if found != self._count:
            raise DataError(f"{self.path}: must stay as it is while it is used, had {self._count} rows, has {found}")

    def _read(self) -> Iterator[Row]:
        return map(_row, _checked(self.path, read_values(self.path), _row_problem))


def load_examples(path: str | Path, *, chat_template: bool = False) -> list[Example]:
    """Read what to train on: instruction rows, conversations or plain texts, as TRL's trainers take them.

    A file holds one kind, that of its first row: with `instruction` instruction rows, otherwise with `messages`
    conversations (a list of objects with `role` and `content`, the last one the assistant's) or with `text` texts.
    Tools, calls of tools, and messages with a `weight` other than 1 are refused: they would be left out.

    Args:
        path: As for `load_rows`.
        chat_template: Whether instruction rows become conversations too, for the tokenizer's chat template.

    Returns:
        For an instruction row its `to_prompt_completion`, with `chat_template` its `to_messages`. For a conversation
        one example for each message of the assistant, with all that was said before as the prompt: every answer is
        learned once, whatever the chat template. For a text the text.

    Raises:
        DataError: as for `load_rows`; or the file holds texts and `chat_template` is set.
    """
    path = Path(path)
    parsed = list(read_values(path))
    first = next((value for _, value in parsed if isinstance(value, dict)), {})
    kind = next((field for field in ("instruction", "messages", "text") if field in first), "instruction")
    if kind == "messages":
        return [turn for value in _checked(path, parsed, _conversation_problem) for turn in _turns(value["messages"])]
    if kind == "text":
        if chat_template:
            raise DataError(f"{path}: a chat template needs instructions or messages, got rows with the field 'text'")
        return [Text(text=value["text"]) for value in _checked(path, parsed, _text_problem)]
    rows = [_row(value) for value in _checked(path, parsed, _row_problem)]
    return [to_messages(row) for row in rows] if chat_template else [to_prompt_completion(row) for row in rows]


def are_conversations(examples: list[Example]) -> bool:
    """Whether examples are written with the tokenizer's chat template, as a file holds one kind."""
    return isinstance(examples[0].get("completion"), list)


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


def to_messages(row: Row) -> Conversation:
    """Turn a row into a conversation of one turn, for a chat template: no headings, the input after a blank line.

    Args:
        row: A row as `load_rows` returns it; `input` may be missing or empty.
    """
    question = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


def _checked(
    path: Path, parsed: Iterable[tuple[str, Any]], problem_of: Callable[[dict[str, Any]], str | None]
) -> Iterator[dict[str, Any]]:
    """The values of a file's rows; DataError at the end unless there was one at least and all were valid."""
    shown, good, bad = [], 0, 0
    for where, value in parsed:
        if isinstance(value, Unparsed):
            problem: str | None = value
        elif not isinstance(value, dict):
            problem = f"must be a JSON object, got {type(value).__name__}"
        else:
            problem = problem_of(value)
        if not problem:
            good += 1
            yield value
            continue
        bad += 1
        if bad <= MAX_SHOWN_PROBLEMS:
            cut = "…" if len(problem) > MAX_SHOWN_CHARACTERS else ""
            shown.append(f"\n  {where}: {problem[:MAX_SHOWN_CHARACTERS]}{cut}")
    if bad:
        rest = f"\n  and {bad - len(shown)} more" if bad > len(shown) else ""
        raise DataError(f"{path}: {bad} bad row(s){''.join(shown)}{rest}")
    if not good:
        raise DataError(f"{path}: holds no rows")


def _row(value: dict[str, Any]) -> Row:
    return {field: value.get(field) or "" for field in REQUIRED_FIELDS + OPTIONAL_FIELDS}


def _row_problem(value: dict[str, Any]) -> str | None:
    """What is wrong with an instruction row, or None."""
    problems = [_text_problem(value, field) for field in REQUIRED_FIELDS]
    problems += [_string_problem(value[field], field) for field in OPTIONAL_FIELDS if field in value]
    return next(filter(None, problems), None) or answer_problem(value)


def _text_problem(value: dict[str, Any], field: str = "text") -> str | None:
    """Why the field is no text with something in it, or None."""
    if field not in value:
        return f"field '{field}' is missing"
    if problem := _string_problem(value[field], field):
        return problem
    return None if value[field].strip() else f"field '{field}' is empty"


def _string_problem(value: Any, field: str) -> str | None:
    """Why the field's value is no text, or None."""
    if not isinstance(value, str):
        return f"field '{field}' must be a string, got {type(value).__name__}"
    if found := _NO_TEXT.search(value):  # what tokenizers cannot encode, or what shows that the file is no text
        return f"field '{field}' must be text, but character {found.start()} is {found[0]!a}"
    return None


def _conversation_problem(value: dict[str, Any]) -> str | None:
    """What is wrong with a row of messages, or None."""
    messages = value.get("messages")
    if not isinstance(messages, list):
        return "field 'messages' is missing or no list"
    if problem := _tools_problem(value):
        return problem
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            return f"message {number} must be a JSON object, got {type(message).__name__}"
        problems = (_tools_problem(message), *(_text_problem(message, field) for field in ("role", "content")))
        if problem := next(filter(None, (*problems, _weight_problem(message))), None):
            return f"message {number}: {problem}"
    roles = [message["role"] for message in messages]
    if len(roles) < 2 or roles[0] == "assistant" or roles[-1] != "assistant":
        must = "messages must begin with another role than the assistant and end with the assistant"
        return f"{must}, got {reprlib.repr(roles)}"
    return None


def _tools_problem(value: dict[str, Any]) -> str | None:
    """What a row or a message has of tools, which would be left out, or None."""
    found = next((field for field in OF_TOOLS if value.get(field)), None)
    return found and f"field '{found}' must be absent: models are not trained to call tools here"


def _weight_problem(message: dict[str, Any]) -> str | None:
    """Why the message's weight cannot be kept to, or None."""
    weight = message.get("weight", 1)
    return None if weight == 1 else f"field 'weight' must be 1, since every answer is learned, got {weight!r}"


def _turns(messages: list[dict[str, str]]) -> Iterator[Conversation]:
    """Every message of the assistant with all before it."""
    said = [{"role": message["role"], "content": message["content"]} for message in messages]
    for place, message in enumerate(said):
        if message["role"] == "assistant":
            yield Conversation(prompt=said[:place], completion=[message])
