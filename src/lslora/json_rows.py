"""From a file to JSON values, each with its place. What is no regular file of UTF-8 JSON is told, never guessed at."""

from __future__ import annotations

import json
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

MAX_ROW_BYTES = 1_000_000
MAX_INTEGER_DIGITS = 640  # what Python converts under any setting of its own limit

# How files begin that are often given by mistake.
_SIGNATURES = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\xff\xfe\x00\x00": "UTF-32",  # before UTF-16, which begins alike
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_SPACE = re.compile(r"[ \t\n\r]*")  # JSON's own; other characters of the kind belong into strings alone


class DataError(ValueError):
    """A data file that cannot be used; the message names the file, the row and what is wrong with it."""


class Unparsed(str):
    """Why a piece of a file is no row, in the place of its value."""


def read_values(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) for every row of a JSON array or a JSONL file.

    Args:
        path: Regular file in UTF-8, with or without a byte order mark; lines may end in LF, CRLF or CR. It is read as
            one JSON array where its first character is `[`, otherwise as JSON Lines (blank lines are skipped).

    Returns:
        For every row its place (`line 3` in a JSONL file, `row 3` in an array) and its value, `Unparsed` where it is
        no JSON, has more than `MAX_ROW_BYTES`, gives a key twice in one object, or holds NaN, an infinity or an
        integer of more than `MAX_INTEGER_DIGITS` digits. A syntax error ends an array: what follows is not read.

    Raises:
        DataError: the file cannot be read or is no text.
    """
    text = _read_text(path)
    start = _after_space(text, 0)
    return _array(text, start) if text.startswith("[", start) else _lines(text)


def _read_text(path: Path) -> str:
    """The file's text with LF as its only line break."""
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # of a folder the operating system says so itself
            raise DataError(f"{path}: must be a regular file, got a pipe, a socket or a device")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    for signature, name in _SIGNATURES.items():
        if content.startswith(signature):
            raise DataError(f"{path}: must be JSON in UTF-8, this file looks like {name}: unpack or convert it first")
    if b"\0" in content:
        place = content.index(b"\0")
        raise DataError(f"{path}: must be UTF-8 text, but byte {place} is NUL ({_line(content, place)})")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is not ({_line(content, error.start)})"
        raise DataError(f"{path}: must be UTF-8 text, but {where}: {error.reason}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _line(content: bytes, place: int) -> str:
    return f"line {len(content[: place + 1].splitlines())}"  # of bytes it splits at CR and LF alone


def _lines(text: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        start = _after_space(line, 0)
        if start < len(line):
            yield f"line {number}", _whole(line, start)


def _whole(line: str, start: int) -> Any:
    """The one value of a line."""
    if too_long := _too_long(line):
        return too_long
    try:
        value, end = _decode(line, start)
        if _after_space(line, end) < len(line):
            raise json.JSONDecodeError("Extra data", line, end)
    except json.JSONDecodeError as error:
        return Unparsed(f"no valid JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return Unparsed("lists or objects are nested too deeply")
    return value


def _array(text: str, start: int) -> Iterator[tuple[str, Any]]:
    place = _after_space(text, start + 1)
    for number in count(1):
        if text.startswith("]", place):
            break
        try:
            if number > 1:
                place = _after_comma(text, place)
            value, end = _decode(text, place)
        except json.JSONDecodeError as error:
            yield f"row {number}", _syntax_error(error)
            return
        except RecursionError:
            yield f"row {number}", Unparsed("lists or objects are nested too deeply")
            return
        yield f"row {number}", _too_long(text[place:end]) or value
        place = _after_space(text, end)
    end = _after_space(text, place + 1)
    if end < len(text):
        yield "after the array", _syntax_error(json.JSONDecodeError("Extra data", text, end))


def _syntax_error(error: json.JSONDecodeError) -> Unparsed:
    return Unparsed(f"line {error.lineno}: no valid JSON: {error.msg} at column {error.colno}")


def _after_comma(text: str, place: int) -> int:
    if not text.startswith(",", place):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
    return _after_space(text, place + 1)


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found else place


def _too_long(piece: str) -> Unparsed | None:
    size = len(piece.encode())
    if size <= MAX_ROW_BYTES:
        return None
    return Unparsed(f"a row must have at most {MAX_ROW_BYTES:,} bytes, got {size:,}")


def _decode(text: str, start: int) -> tuple[Any, int]:
    """The value that begins at `start`, and where it ends."""
    problems: list[str] = []  # noted and not raised: the end of the value, where the next row begins, is still needed

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):  # JSON readers keep the last in silence
            key, times = Counter(key for key, _ in pairs).most_common(1)[0]
            problems.append(f"the key {reprlib.repr(key)} stands {times} times in one object")
        return value

    def integer(digits: str) -> int:
        if len(digits) <= MAX_INTEGER_DIGITS:
            return int(digits)
        problems.append(f"an integer must have at most {MAX_INTEGER_DIGITS} digits, got {len(digits):,}")
        return 0

    def constant(name: str) -> float:
        problems.append(f"{name} is no JSON")
        return float(name)

    decoder = json.JSONDecoder(object_pairs_hook=object_of, parse_int=integer, parse_constant=constant)
    value, end = decoder.raw_decode(text, start)
    return (Unparsed(problems[0]) if problems else value), end
