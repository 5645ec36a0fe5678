"""adapter_config.json, which may come from anyone: read as strictly as it is written."""

from __future__ import annotations

import dataclasses
import json
import math
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

# Patterns that name every expert of the largest models take half of it. Parsed, JSON takes up to 30 times its size.
MAX_BYTES = 4 * 2**20


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most 4 MiB.

    Raises:
        ValueError: the file is larger, no UTF-8, no JSON, no object or nested too deep; the message names it.
    """
    return _parse(path)


def read_settings(path: Path, config_class: type) -> dict[str, Any]:
    """The settings in a file, each of them a field of `config_class` and of its type.

    Args:
        path: As `read_object` wants it.
        config_class: The dataclass whose annotations say which settings there are and of which type.

    Raises:
        ValueError: as in `read_object`; or a setting is unknown, stands there twice or is no finite number.
        TypeError: a setting has another type than its field.
    """
    settings = _parse(path, object_pairs_hook=_distinct, parse_constant=_refuse, parse_float=_finite)
    # What is computed at run time is no setting. peft takes any number for an alpha, whatever its annotation says.
    hints = {**get_type_hints(config_class), "lora_alpha": float}
    known = {field.name for field in dataclasses.fields(config_class)} - {"runtime_config"}
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"{path}: every key must be a setting of {config_class.__name__}, got {brief(name)}")
        if not _fits(value, hints[name]):
            raise TypeError(f"{path}: {name} must be {_words(hints[name])}, got {brief(value)}")
    return settings


def brief(value: object) -> str:
    """The value as a message shows it: its first 100 characters, if there are more."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _parse(path: Path, **hooks: Any) -> dict[str, Any]:
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"{path} must have at most {MAX_BYTES} bytes, got {path.stat().st_size}")
    try:
        found = json.loads(raw.decode("utf-8"), **hooks)
    except RecursionError as error:
        raise ValueError(f"{path} must be JSON of a few levels, got more than can be read") from error
    except ValueError as error:
        raise ValueError(f"{path} must be JSON in UTF-8: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {brief(found)}")
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"a key must stand there once, got {brief(max(keys, key=keys.count))} more often")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"numbers must be finite, got {constant}")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"numbers must be finite, got {brief(text)}")
    return number


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a JSON file is what an annotation says: tuples are lists there, and dataclasses objects."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(args) and all(map(_fits, value, args))
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, args[1]) for item in value.values())
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    if issubclass(hint, Enum):
        return isinstance(value, str)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _words(hint: Any) -> str:
    """An annotation without the names of modules."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_words, get_args(hint))))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is None:
        return "null" if hint is type(None) else hint.__name__
    return str(hint)
