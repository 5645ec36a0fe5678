"""From a file to JSON values, each with its place. What is no regular file of UTF-8 JSON is told, never guessed at.

A file is read in pieces: of one of any size no more is held than a few of its rows.
"""

from __future__ import annotations

import codecs
import json
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, TextIO

MAX_ROW_BYTES = 1_000_000
MAX_INTEGER_DIGITS = 640  # what Python converts under any setting of its own limit
LONGEST_DOUBT = 3  # characters behind a value that tell that it ends there: of 1e+5 the first is a number, too
PIECE = 1 << 16  # characters, or bytes, that are read at once

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
        DataError: the file cannot be read or is no text; told before the first row.
    """
    try:
        _check_text(path)
        # Universal newlines: LF is the only line break from here on.
        with path.open(encoding="utf-8-sig") as file:
            text = _Text(file)
            if text.skip("["):
                yield from _array(text)
            else:
                file.seek(0)
                yield from _lines(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _check_text(path: Path) -> None:
    """DataError unless the file is a regular one and UTF-8 text."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # of a folder the operating system says so itself
        raise DataError(f"{path}: must be a regular file, got a pipe, a socket or a device")
    with path.open("rb") as file:
        head = file.read(max(map(len, _SIGNATURES)))
        for signature, name in _SIGNATURES.items():
            if head.startswith(signature):
                must = "must be JSON in UTF-8, this file looks like"
                raise DataError(f"{path}: {must} {name}: unpack or convert it first")
        file.seek(0)
        decoder, place, piece = codecs.getincrementaldecoder("utf-8")(), 0, head
        while piece:
            piece = file.read(PIECE)
            until_nul, nul, _ = piece.partition(b"\0")
            begun = len(decoder.getstate()[0])  # bytes of a character whose end is in this piece
            try:
                decoder.decode(until_nul, final=not piece)
            except UnicodeDecodeError as error:
                bad = place - begun + error.start
                where = f"byte {bad} is not ({_line(path, bad)})"
                raise DataError(f"{path}: must be UTF-8 text, but {where}: {error.reason}") from error
            if nul:
                bad = place + len(until_nul)
                raise DataError(f"{path}: must be UTF-8 text, but byte {bad} is NUL ({_line(path, bad)})")
            place += len(piece)


def _line(path: Path, place: int) -> str:
    """The line that holds the byte at `place`."""
    number = end = 0
    with path.open(encoding="latin-1", newline="") as file:  # a character a byte
        while end <= place:
            end += len(file.readline())
            number += 1
    return f"line {number}"


def _lines(file: TextIO) -> Iterator[tuple[str, Any]]:
    # A file's own lines end in LF alone: JSON strings may hold U+2028 and its like unescaped.
    decoder = _Decoder()
    for number, line in enumerate(file, start=1):
        if not _is_space(line):
            yield f"line {number}", _whole(decoder, line.removesuffix("\n"))


def _is_space(text: str) -> bool:
    return _after_space(text, 0) == len(text)


def _whole(decoder: _Decoder, line: str) -> Any:
    """The one value of a line."""
    if too_long := _too_long(line):
        return too_long
    try:
        value, end = decoder.value(line, _after_space(line, 0))
        if _after_space(line, end) < len(line):
            raise json.JSONDecodeError("Extra data", line, end)
    except json.JSONDecodeError as error:
        return Unparsed(f"no valid JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return Unparsed("lists or objects are nested too deeply")
    return value


def _array(text: _Text) -> Iterator[tuple[str, Any]]:
    """The values of an array whose bracket has been read."""
    for number in count(1):
        if text.skip("]"):
            break
        try:
            if number > 1 and not text.skip(","):
                raise text.error("Expecting ',' delimiter")
            value, written = text.value()
        except json.JSONDecodeError as error:
            yield f"row {number}", text.syntax_error(error)
            return
        except RecursionError:
            yield f"row {number}", Unparsed("lists or objects are nested too deeply")
            return
        yield f"row {number}", _too_long(written) or value
    if not text.has_ended():
        yield "after the array", text.syntax_error(text.error("Extra data"))


class _Text:
    """What of a file's text is at hand, and how far it has been read."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.held, self.place, self.decoder = file, "", 0, _Decoder()
        self.line = self.column = 0  # of the first character held, in the file

    def more(self) -> bool:
        """Read on: as much as is left to be read of what is held, so that long rows are not read again too often."""
        piece = self.file.read(max(PIECE, len(self.held) - self.place))
        if piece:
            breaks = self.held.count("\n", 0, self.place)
            self.line += breaks
            self.column = self.place - self.held.rfind("\n", 0, self.place) - 1 + (0 if breaks else self.column)
            self.held, self.place = self.held[self.place :] + piece, 0
        return bool(piece)

    def has_ended(self) -> bool:
        """Whether nothing but space is left; what there is of it is skipped."""
        self.place = _after_space(self.held, self.place)
        while self.place == len(self.held) and self.more():
            self.place = _after_space(self.held, self.place)
        return self.place == len(self.held)

    def skip(self, character: str) -> bool:
        """Whether this character comes next, after space; then it is read."""
        found = not self.has_ended() and self.held[self.place] == character
        self.place += found
        return found

    def value(self) -> tuple[Any, str]:
        """The value that comes next, after space, and how it is written; JSONDecodeError where there is none."""
        self.has_ended()
        while True:
            try:
                value, end = self.decoder.value(self.held, self.place)
                if end + LONGEST_DOUBT <= len(self.held) or not self.more():
                    break
            except json.JSONDecodeError:
                if not self.more():
                    raise
        written = self.held[self.place : end]
        self.place = end
        return value, written

    def error(self, message: str) -> json.JSONDecodeError:
        return json.JSONDecodeError(message, self.held, self.place)

    def syntax_error(self, error: json.JSONDecodeError) -> Unparsed:
        column = error.colno + (self.column if error.lineno == 1 else 0)
        return Unparsed(f"line {self.line + error.lineno}: no valid JSON: {error.msg} at column {column}")


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found else place


def _too_long(piece: str) -> Unparsed | None:
    size = len(piece.encode())
    if size <= MAX_ROW_BYTES:
        return None
    return Unparsed(f"a row must have at most {MAX_ROW_BYTES:,} bytes, got {size:,}")


class _Decoder(json.JSONDecoder):
    """Reads one value, and notes what JSON readers let pass.

    Noted and not raised: the end of the value, where the next row begins, is still needed.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        super().__init__(object_pairs_hook=self.object_of, parse_int=self.integer, parse_constant=self.constant)

    def value(self, text: str, start: int) -> tuple[Any, int]:
        """The value that begins at `start`, `Unparsed` if there was something to note, and where it ends."""
        self.problems.clear()
        value, end = self.raw_decode(text, start)
        return (Unparsed(self.problems[0]) if self.problems else value), end

    def object_of(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):  # JSON readers keep the last in silence
            key, times = Counter(key for key, _ in pairs).most_common(1)[0]
            self.problems.append(f"the key {reprlib.repr(key)} stands {times} times in one object")
        return value

    def integer(self, digits: str) -> int:
        if len(digits) <= MAX_INTEGER_DIGITS:
            return int(digits)
        self.problems.append(f"an integer must have at most {MAX_INTEGER_DIGITS} digits, got {len(digits):,}")
        return 0

    def constant(self, name: str) -> float:
        self.problems.append(f"{name} is no JSON")
        return float(name)
