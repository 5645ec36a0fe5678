"""Writes docs/configuration.md from the docstrings and the command line's help: `python -m tests.configuration`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import LoraConfig

from lslora import LSLoraConfig
from lslora.callback import SplineCallback
from lslora.config import RECOMMENDED
from lslora.training import RECOMMENDED_SPLINE_LR, SplineTrainerMixin

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import eval_lslora  # noqa: E402
import export_lslora  # noqa: E402
import train_lslora  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"
HEAD = """# Configuration

Written by `python -m tests.configuration` from the docstrings; a test compares.

## LSLoraConfig

All of `peft.LoraConfig`, and the spline's settings:

"""


def page() -> str:
    fields = {field.name: field for field in dataclasses.fields(LSLoraConfig)}
    own = [name for name in fields if name not in {field.name for field in dataclasses.fields(LoraConfig)}]
    described = arguments_of(LSLoraConfig)
    assert described.keys() == set(own), "every setting is described, and no other"
    rows = [(f"`{name}`", kind(fields[name].type), code(fields[name].default), described[name]) for name in described]
    recommended = ", ".join(f"`{name}={value!r}`" for name, value in RECOMMENDED.items())
    parts = [HEAD + table(("setting", "type", "default", ""), rows)]
    parts.append(
        f"`LSLoraConfig.recommended(**overrides)` changes {recommended} and `lora_alpha` to 10 r; set "
        f"`calibration_steps` to a third of the steps, and the splines' learning rate to {RECOMMENDED_SPLINE_LR:g}, "
        "whatever that of A and B.\n"
    )
    for owner in (SplineTrainerMixin, SplineCallback):
        rows = [(f"`{name}`", code(default_of(owner, name)), text) for name, text in arguments_of(owner).items()]
        parts.append(f"## {owner.__name__}\n\n{first_sentence(owner)}\n\n{table(('argument', 'default', ''), rows)}")
    for script in (train_lslora, eval_lslora, export_lslora):
        parts.append(f"## {script.__name__}.py\n\n{options(script.parser())}")
    return "\n".join(parts)


def arguments_of(owner: Any) -> dict[str, str]:
    """Name → description of the `Args:` of a docstring."""
    section = inspect.getdoc(owner).split("Args:\n")[1].split("\nRaises:")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def first_sentence(owner: Any) -> str:
    return inspect.getdoc(owner).split("\n\n")[0].replace("\n", " ")


def default_of(owner: Any, name: str) -> Any:
    return inspect.signature(owner.__init__).parameters[name].default


def kind(annotation: str) -> str:
    literal = re.fullmatch(r"Literal\[(.*)\]", annotation)
    return ", ".join(f"`{word}`" for word in literal[1].split(", ")) if literal else annotation


def code(value: Any) -> str:
    return f"`{value!r}`"


def options(parser: argparse.ArgumentParser) -> str:
    """The options of a script, by its groups if it has any."""
    _, plain, *groups = parser._action_groups
    if not groups:
        return option_table(action for action in plain._group_actions if action.dest != "help")
    return "\n".join(f"### {group.title}\n\n{option_table(group._group_actions)}" for group in groups)


def option_table(actions: Iterable[argparse.Action]) -> str:
    rows = [
        (", ".join(f"`{name}`" for name in action.option_strings), shown(action), explained(action))
        for action in actions
    ]
    return table(("option", "default", ""), rows)


def shown(action: argparse.Action) -> str:
    if action.required:
        return "required"
    if isinstance(action.default, list):
        return f"`{' '.join(action.default)}`"
    return "" if action.default is None or action.default is False else f"`{action.default}`"


def explained(action: argparse.Action) -> str:
    choices = ", ".join(f"`{choice}`" for choice in action.choices or ())
    return "; ".join(filter(None, (choices, action.help)))


def table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (headings, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(headings), *lines[1:]]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
