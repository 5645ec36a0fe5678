"""The outcomes of all operations as a Markdown page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib.metadata import version
from itertools import groupby

from . import layers, life, options, tasks, tools  # noqa: F401  (they register their operations)
from .registry import OPERATIONS, PLACEMENTS, Operation, outcome

PACKAGES = ("peft", "transformers", "torch")
Results = list[tuple[Operation, list[str]]]

HEAD = """# Compatibility

What peft and transformers do with LoRA adapters, done with LS-LoRA. Every row is an operation that was run in the
three placements of the spline. It works (same numbers as plain LoRA at the identity, or as the operation's own check
says) or raises the error that is quoted. `python -m tests.compatibility` writes this page; a test runs it again.

"""


def results(progress: Callable[[Iterable], Iterable] = iter) -> Results:
    return [(op, [outcome(op.run, placement) for placement in PLACEMENTS]) for op in progress(OPERATIONS)]


def page(found: Results) -> str:
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    parts = [HEAD, f"With {versions}.\n"]
    for group, rows in groupby(found, key=lambda row: row[0].group):
        parts += [f"\n## {group}\n\n", "| operation | result |\n|---|---|\n"]
        parts += [f"| {escape(op.name)} | {cell(outcomes)} |\n" for op, outcomes in rows]
    return "".join(parts)


def cell(outcomes: list[str]) -> str:
    """One text where all placements agree, else one for each."""
    texts = list(map(text, outcomes))
    if len(set(texts)) == 1:
        return texts[0]
    return "<br>".join(f"{placement}: {found}" for placement, found in zip(PLACEMENTS, texts, strict=True))


def text(outcome: str) -> str:
    return outcome if outcome == "works" else f"refuses: {escape(shorten(outcome))}"


def shorten(message: str) -> str:
    """The message's first sentences, without what differs from run to run."""
    message = re.sub(r"/tmp/\S+|0x[0-9a-f]+", "…", " ".join(message.split()))
    return message if len(message) <= 200 else message[:200].rsplit(" ", 1)[0] + " …"


def escape(value: str) -> str:
    return value.replace("|", "\\|")
