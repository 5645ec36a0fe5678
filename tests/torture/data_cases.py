"""Hand-made data files that must be refused: name, how the file is made, and words that the message must have."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import socket
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROW = {"instruction": "Is it so?\n\nAnswer format: true/false", "input": "", "output": "the correct answer is true"}
ROW |= {"answer": "true", "task": "boolq"}
PLAIN = {"instruction": "Say hi.", "output": "hi"}
GOOD = json.dumps(ROW)
BIG = PLAIN | {"output": "x" * 10_000_000}
TALK = [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "It is."}]
DEEP = 100_000


class Case(NamedTuple):
    """A bad file. `make` writes it at the path that it is given; `words` stand in the message of `load_examples`."""

    name: str
    make: Callable[[Path], object]
    words: str


def content(name: str, made: str | bytes, words: str) -> Case:
    """A regular file with this content."""
    return Case(name, lambda path: path.write_bytes(made if isinstance(made, bytes) else made.encode()), words)


def row(name: str, change: dict[str, object], words: str) -> Case:
    """A good row, and one changed so, in a JSONL file."""
    return content(name, f"{GOOD}\n{json.dumps(ROW | change)}\n", f"line 2: {words}")


def talk(name: str, messages: object, words: str) -> Case:
    return content(name, json.dumps([{"messages": TALK}, {"messages": messages}]), f"row 2: {words}")


def raw(name: str, line: str, words: str) -> Case:
    return content(name, f"{GOOD}\n{line}\n{GOOD}\n", f"1 bad row(s)\n  line 2: {words}")


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("rows.jsonl", GOOD)
    return file.getvalue()


def loop(path: Path) -> None:
    other = path.with_name("other")
    other.unlink(missing_ok=True)
    other.symlink_to(path)
    path.symlink_to(other)


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.getcwd()
        os.chdir(path.parent)  # the name of a socket must be short
        try:
            server.bind(path.name)
        finally:
            os.chdir(folder)


def locked(path: Path) -> None:
    path.write_text(GOOD)
    path.chmod(0)


FILES = [
    Case("no file", lambda path: None, "cannot be read: No such file"),
    Case("a folder", lambda path: path.mkdir(), "cannot be read: Is a directory"),
    Case("a symlink loop", loop, "cannot be read: Too many levels of symbolic links"),
    Case("a symlink to nothing", lambda path: path.symlink_to("nothing"), "cannot be read: No such file"),
    Case("a pipe", lambda path: os.mkfifo(path), "must be a regular file"),
    Case("an endless device", lambda path: path.symlink_to("/dev/zero"), "must be a regular file"),
    Case("an empty device", lambda path: path.symlink_to("/dev/null"), "must be a regular file"),
    Case("a socket", socket_at, "must be a regular file"),
    content("an empty file", "", "holds no rows"),
    content("nothing but blank lines", " \n\r\n\t\n", "holds no rows"),
    content("nothing but a byte order mark", b"\xef\xbb\xbf", "holds no rows"),
    content("an empty array", "[ ]", "holds no rows"),
]
if os.geteuid():
    FILES.append(Case("a file without permission", locked, "cannot be read: Permission denied"))
if sys.platform == "linux":  # a regular file whose first byte cannot be read, not even by root
    FILES.append(Case("a broken disk", lambda path: path.symlink_to("/proc/self/mem"), "cannot be read: Input/output"))

ENCODINGS = [
    content("UTF-16", GOOD.encode("utf-16"), "looks like UTF-16"),
    content("UTF-16, big-endian", b"\xfe\xff" + GOOD.encode("utf-16-be"), "looks like UTF-16"),
    content("UTF-16 without a mark", GOOD.encode("utf-16-le"), "byte 1 is NUL (line 1)"),
    content("UTF-32", GOOD.encode("utf-32"), "looks like UTF-32"),
    content("latin-1", f'{GOOD}\n{{"instruction": "é"}}'.encode("latin-1"), "is not (line 2)"),
    content("half a character", GOOD.encode() + "é".encode()[:1], "must be UTF-8 text"),
    content("a surrogate as bytes", b'{"instruction": "\xed\xa0\x80", "output": "b"}', "must be UTF-8 text"),
    content("an overlong character", b'{"instruction": "\xc0\x80", "output": "b"}', "must be UTF-8 text"),
    content("a NUL byte", GOOD.encode() + b"\n\0\n", "is NUL (line 2)"),
    content("gzip", gzip.compress(GOOD.encode()), "looks like gzip"),
    content("zip", zipped(), "looks like zip"),
    content("bzip2", bz2.compress(GOOD.encode()), "looks like bzip2"),
    content("xz", lzma.compress(GOOD.encode()), "looks like xz"),
    content("Parquet", b"PAR1" + bytes(range(256)) + b"PAR1", "looks like Parquet"),
    content("Arrow", b"ARROW1\0\0" + bytes(64), "looks like Arrow"),
    content("a pickle", b"\x80\x04\x95" + struct.pack("<Q", 3) + b"]\x94.", "must be UTF-8 text"),
    content("a byte order mark between files", f"{GOOD}\n\ufeff{GOOD}\n", "line 2: no valid JSON"),
]

SYNTAX = [
    content("a cut JSONL file", f"{GOOD}\n{GOOD[:40]}", "line 2: no valid JSON: Unterminated string"),
    content("a cut array", f"[{GOOD}, {GOOD[:40]}", "row 2: line 1: no valid JSON: Unterminated string"),
    content("an array without its end", f"[{GOOD}", "row 2: line 1: no valid JSON: Expecting ',' delimiter"),
    content("an array's comma at the end", f"[{GOOD},]", "row 2: line 1: no valid JSON"),
    content("an array without commas", f"[{GOOD}\n{GOOD}]", "row 2: line 2: no valid JSON: Expecting ',' delimiter"),
    content("something after the array", f"[{GOOD}]\n{GOOD}", "after the array: line 2: no valid JSON: Extra data"),
    content("an object over several lines", json.dumps(ROW, indent=1), "line 1: no valid JSON"),
    content("CSV", "instruction,output\na,b\n", "2 bad row(s)\n  line 1: no valid JSON: Expecting value"),
    content("a web page", "<!DOCTYPE html>\n<html></html>", "line 1: no valid JSON"),
    content("a form feed between rows", f"{GOOD}\n\x0c\n{GOOD}", "line 2: no valid JSON"),
    content("a bad line and CR alone", f"{GOOD}\r{{\r{GOOD}", "1 bad row(s)\n  line 2: no valid JSON"),
    raw("two rows in a line", GOOD + GOOD, "no valid JSON: Extra data"),
    raw("single quotes", str(ROW), "no valid JSON"),
    raw("a comment", "// rows", "no valid JSON"),
    raw("a tab in a string", '{"instruction": "a\tb", "output": "c"}', "no valid JSON: Invalid control character"),
    raw("a wrong escape", r'{"instruction": "\x41", "output": "c"}', r"no valid JSON: Invalid \escape"),
    raw("a key twice", '{"instruction": "a", "output": "b", "output": "c"}', "the key 'output' stands 2 times"),
    raw("a key twice within", GOOD[:-1] + ', "more": {"a": 1, "a": 1}}', "the key 'a' stands 2 times"),
    raw("a key twice, once escaped", r'{"instruction": "a", "output": "b", "\u006futput": "c"}', "the key 'output'"),
    raw("NaN", GOOD[:-1] + ', "score": NaN}', "NaN is no JSON"),
    raw("infinity", GOOD[:-1] + ', "score": -Infinity}', "-Infinity is no JSON"),
    raw("5,000 digits", GOOD[:-1] + f', "id": {"9" * 5000}}}', "an integer must have at most 640 digits, got 5,000"),
    raw("100,000 lists", GOOD[:-1] + f', "x": {"[" * DEEP}{"]" * DEEP}}}', "lists or objects are nested too deeply"),
    raw("100,000 objects", '{"a":' * DEEP + "1" + "}" * DEEP, "lists or objects are nested too deeply"),
    content("an array of 100,000 lists", "[" * DEEP + "]" * DEEP, "row 1: lists or objects are nested too deeply"),
    raw(
        "10 MB in a row",
        json.dumps(PLAIN | {"output": "x" * 10_000_000}),
        "a row must have at most 1,000,000 bytes, got 10,000,040",
    ),
    content("10 MB in a row of an array", json.dumps([PLAIN, BIG]), "row 2: a row must have at most 1,000,000 bytes"),
    raw("10 MB of spaces", " " * 10_000_000 + GOOD, "a row must have at most 1,000,000 bytes, got 10,000,145"),
]

FIELDS = [
    raw("a row that is a list", "[]", "must be a JSON object, got list"),
    raw("a row that is a string", '"text"', "must be a JSON object, got str"),
    raw("a row that is null", "null", "must be a JSON object, got NoneType"),
    raw("an empty row", "{}", "field 'instruction' is missing"),
    row("an instruction that is null", {"instruction": None}, "field 'instruction' must be a string, got NoneType"),
    row("an output that is a number", {"output": 3}, "field 'output' must be a string, got int"),
    row("an output that is a truth value", {"output": True}, "field 'output' must be a string, got bool"),
    row("an output that is a list", {"output": ["a"]}, "field 'output' must be a string, got list"),
    row("an input that is an object", {"input": {}}, "field 'input' must be a string, got dict"),
    row("an answer that is null", {"answer": None}, "field 'answer' must be a string, got NoneType"),
    row("a task that is a number", {"task": 1.5}, "field 'task' must be a string, got float"),
    row("an empty instruction", {"instruction": ""}, "field 'instruction' is empty"),
    row("an output of spaces", {"output": " \n\u00a0"}, "field 'output' is empty"),
    row("half a surrogate pair", {"output": "a\ud800"}, r"field 'output' must be text, but character 1 is '\ud800'"),
    row("the other half, in the input", {"input": "\udfff"}, r"field 'input' must be text, but character 0 is"),
    row("a NUL character", {"output": "a\0"}, r"field 'output' must be text, but character 1 is '\x00'"),
    row("an answer that is no option", {"answer": "maybe"}, "the answer must be one of true/false, got 'maybe'"),
    row("an option in capitals", {"answer": "True"}, "the answer must be one of true/false, got 'True'"),
    row("an output that gives another", {"answer": "false"}, "the output must give the answer 'false', got 'true'"),
    row("an output that gives none", {"output": "Who knows?"}, "the output must give the answer 'true', got None"),
    content("texts after instructions", f'{GOOD}\n{{"text": "a"}}', "line 2: field 'instruction' is missing"),
    content("instructions after texts", f'{{"text": "a"}}\n{GOOD}', "line 2: field 'text' is missing"),
    content("an empty text", '[{"text": "a"}, {"text": " "}]', "row 2: field 'text' is empty"),
    content("a text with half a pair", '{"text": "a\\udc00"}', "line 1: field 'text' must be text"),
    talk("messages that are a string", "hi", "field 'messages' is missing or no list"),
    talk("no messages", [], "messages must begin with another role"),
    talk("a message that is a string", ["hi"], "message 1 must be a JSON object, got str"),
    talk("messages without an answer", TALK[:1], "messages must begin with another role"),
    talk("a message without a role", [{"content": "a"}, TALK[1]], "message 1: field 'role' is missing"),
    talk("a content that is null", [TALK[0], TALK[1] | {"content": None}], "message 2: field 'content' must be a"),
    talk(
        "a content that is parts", [TALK[0] | {"content": [{"type": "text"}]}, TALK[1]], "message 1: field 'content'"
    ),
    talk("a content with half a pair", [TALK[0], TALK[1] | {"content": "\ud800"}], "message 2: field 'content' must"),
    content(
        "many bad rows",
        "\n".join([GOOD, *["{}"] * 12]),
        "12 bad row(s)\n  line 2: field 'instruction' is missing",
    ),
]

CASES = [*FILES, *ENCODINGS, *SYNTAX, *FIELDS]
