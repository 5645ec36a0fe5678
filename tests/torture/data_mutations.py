"""Files that were good once: seeded changes of JSON and JSONL files of all three kinds, in bytes and in structure."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from .data_cases import PLAIN, ROW, TALK

KINDS = [
    [ROW, PLAIN | {"input": "loudly", "answer": "hi"}, ROW | {"answer": "false", "output": "false"}],
    [{"messages": [*TALK, *TALK]}, {"messages": [{"role": "system", "content": "Be kind."}, *TALK], "id": 7}],
    [{"text": "once upon a time"}, {"text": "é\u2028\U0001f600", "meta": {"a": [1, 2.5, None, True]}}],
]
TOKENS = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\n", b"\r", b"\r\n", b"\t", b" ", b"\0", b"\xff"]
TOKENS += [b"\xc3", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\x1f\x8b", b"\\ud800", b"\\udc00", b"\\u0000"]
TOKENS += [b"null", b"NaN", b"1e999", b"-Infinity", b"true", b"0", b"-", b"9" * 700, b"[" * 1500, b'{"a":' * 1500]
TOKENS += [b"{}", b"[]", b'""', b'"output": "other",', b'"answer": "maybe",', b'"messages": [],', b'"text": "a",']
TOKENS += [b"Answer format: a/b"]
VALUES: list[Any] = [None, True, 0, 1.5, 10**700, "", " ", "\0", "\ud800", "a", [], {}, ["a"], {"a": 1}, TALK, ROW]
VALUES += ["true", "maybe", "Answer format: yes/no", "assistant", "x" * 1000]
KEYS = ["instruction", "output", "input", "answer", "task", "messages", "text", "role", "content", "x", ""]


class Pairs(list):
    """An object as its pairs, in which a key may stand twice."""


def fuzzed(seed: str) -> bytes:
    """One file; the same for the same seed."""
    draw = random.Random(seed)
    rows = draw.choice(KINDS)
    values = [pairs_of(value) for value in draw.sample(rows, draw.randint(1, len(rows)))]
    if draw.random() < 0.6:
        for _ in range(draw.randint(1, 3)):
            change_structure(draw, values)
    content = written(draw, values)
    if draw.random() < 0.6:
        for _ in range(draw.randint(1, 3)):
            content = draw.choice(BYTE_CHANGES)(draw, content)
    return content


def pairs_of(value: Any) -> Any:
    if isinstance(value, dict):
        return Pairs([key, pairs_of(item)] for key, item in value.items())
    return [pairs_of(item) for item in value] if isinstance(value, list) else value


def written(draw: random.Random, values: list[Any]) -> bytes:
    texts = [text_of(value, ascii_only=draw.random() < 0.5) for value in values]
    joined = f"[{', '.join(texts)}]" if draw.random() < 0.5 else draw.choice(["\n", "\r\n", "\r"]).join(texts)
    return (draw.choice(["", "", "\ufeff"]) + joined).encode("utf-8", "surrogatepass")


def text_of(value: Any, *, ascii_only: bool) -> str:
    if isinstance(value, Pairs):
        pairs = (f"{json.dumps(key)}: {text_of(item, ascii_only=ascii_only)}" for key, item in value)
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{', '.join(text_of(item, ascii_only=ascii_only) for item in value)}]"
    return json.dumps(value, ensure_ascii=ascii_only)


def change_structure(draw: random.Random, values: list[Any]) -> None:
    """Change one thing, somewhere within the rows."""
    holders = [values]
    for holder in holders:  # grows as it goes
        items = [item for _, item in holder] if isinstance(holder, Pairs) else holder
        holders += [item for item in items if isinstance(item, list)]
    holder = draw.choice(holders)
    place = draw.randrange(len(holder) + 1)
    value = pairs_of(draw.choice(VALUES))
    if place == len(holder):
        holder.append([draw.choice(KEYS), value] if isinstance(holder, Pairs) else value)
    elif draw.random() < 0.2:
        del holder[place]
    elif not isinstance(holder, Pairs):
        holder[place] = value
    elif draw.random() < 0.6:
        holder[place] = [holder[place][0], value]
    else:
        holder.append([holder[place][0], draw.choice([value, holder[place][1]])])


def flip(draw: random.Random, content: bytes) -> bytes:
    place = draw.randrange(len(content) + 1)
    return content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :]


def cut(draw: random.Random, content: bytes) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def remove(draw: random.Random, content: bytes) -> bytes:
    place = draw.randrange(len(content) + 1)
    return content[:place] + content[place + draw.randint(1, 8) :]


def insert(draw: random.Random, content: bytes) -> bytes:
    place = draw.randrange(len(content) + 1)
    return content[:place] + draw.choice(TOKENS) + content[place:]


def repeat(draw: random.Random, content: bytes) -> bytes:
    start, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    return content[:end] + content[start:end] + content[end:]


def encode(draw: random.Random, content: bytes) -> bytes:
    return content.decode("utf-8", "replace").encode(
        draw.choice(["latin-1", "utf-16", "utf-16-le", "utf-32"]), "replace"
    )


BYTE_CHANGES: list[Callable[[random.Random, bytes], bytes]] = [flip, flip, cut, remove, insert, insert, repeat, encode]
