"""What a loader makes of a file, and whether what it takes is valid: judged by the file's bytes, not by lslora."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lslora import data

LOADERS: dict[str, Callable[[Path], list[Any]]] = {
    "load_rows": data.load_rows,
    "load_examples": data.load_examples,
    "load_examples, chat": partial(data.load_examples, chat_template=True),
}


class Verdict(NamedTuple):
    """`kind` is refused, accepted, traceback or silent; `message` the error's, or what is wrong with the rows."""

    kind: str
    message: str


def judge(loader: Callable[[Path], list[Any]], path: Path) -> Verdict:
    """Call a loader for a file."""
    try:
        loaded = loader(path)
    except data.DataError as error:
        named = str(error).startswith(f"{path}: ")
        return Verdict("refused", str(error)) if named else Verdict("traceback", f"does not name its file: {error}")
    except Exception as error:  # whatever it is, it is what this looks for
        return Verdict("traceback", f"{type(error).__name__}: {error}"[:300])
    wrong = whats_wrong(path.read_bytes(), loaded)
    return Verdict("silent", wrong) if wrong else Verdict("accepted", "")


def whats_wrong(content: bytes, loaded: list[Any]) -> str:
    """Why a file with this content must not have been loaded, or not so; empty where all is well."""
    try:
        values = [value for text in pieces(content) for value in parsed(text)]
    except ValueError as error:
        return f"the file is no JSON: {error}"
    if not values or not loaded:
        return "there are no rows"
    # load_rows takes instructions alone, load_examples the kind of the first row.
    kinds = ("instruction",) if "instruction" in loaded[0] else ("instruction", "messages", "text")
    kind = next((kind for kind in kinds if kind in values[0]), "instruction")
    if not all(kind in value for value in values):
        return f"a row has no {kind}"
    if [text for value in values for text in told(kind, value)] != [learned(item) for item in loaded]:
        return "the file says something else"
    problems = [string_problem(text) for item in loaded for text in strings(item)]
    if kind == "instruction":
        problems += [row_problem(value) for value in values]
    return next(filter(None, problems), "")


def pieces(content: bytes) -> list[str]:
    text = content.decode("utf-8").removeprefix("\ufeff").replace("\r", "\n")
    return [text] if text.strip().startswith("[") else [line for line in text.split("\n") if line.strip()]


def parsed(text: str) -> list[dict[str, Any]]:
    """The rows of an array or of a line; ValueError where a key stands twice, or for what is no JSON."""

    def unique(pairs):
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    def refuse(name):
        raise ValueError(name)

    found = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    rows = found if isinstance(found, list) else [found]
    if not all(isinstance(value, dict) for value in rows):
        raise ValueError("a row is no object")
    return rows


def told(kind: str, value: dict[str, Any]) -> list[Any]:
    """What a row of the file has to teach."""
    if kind == "messages":
        return [message["content"] for message in value["messages"] if message["role"] == "assistant"]
    return [value.get("output" if kind == "instruction" else "text")]


def learned(item: dict[str, Any]) -> Any:
    """What a loaded row or example teaches."""
    if "completion" in item:
        completion = item["completion"]
        return completion if isinstance(completion, str) else completion[0]["content"]
    return item["output"] if "output" in item else item["text"]


def strings(item: dict[str, Any]) -> list[Any]:
    """Everything that must be text and not empty in a loaded row or example."""
    if "instruction" in item:
        return [item["instruction"], item["output"]]
    if "text" in item:
        return [item["text"]]
    parts = [item["prompt"], item["completion"]]
    if isinstance(item["prompt"], str):
        return parts
    return [text for part in parts for message in part for text in (message["role"], message["content"])]


def string_problem(text: Any) -> str:
    if not isinstance(text, str):
        return f"{text!r} is no string"
    return "a text is empty" if not text.strip() else character_problem(text)


def character_problem(text: str) -> str:
    bad = any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text)
    return f"{text!r} is no text" if bad else ""


def row_problem(value: dict[str, Any]) -> str:
    """What is wrong with an instruction row of the file."""
    for field in ("input", "answer", "task"):
        text = value.get(field, "")
        if not isinstance(text, str):
            return f"{field} is no string"
        if problem := character_problem(text):
            return problem
    _, named, tail = value["instruction"].lower().rpartition("answer format:")
    tail = tail.lstrip(" \t").rstrip()
    options = tail.split("/")
    listed = named and tail.split() == [tail] and all(options) and len(set(options)) > 1
    if listed and value.get("answer") and value["answer"].lower() not in options:
        return f"the answer {value['answer']!r} is not among {options}"
    return ""
