"""Operations by group and name, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

PLACEMENTS = ("output", "bottleneck", "weight")
REFUSALS = (ValueError, TypeError, KeyError, NotImplementedError, AttributeError, RuntimeError)


class Operation(NamedTuple):
    """`run(placement)` returns if it works, raises `RefusedError` if it is refused; anything else is a defect."""

    group: str
    name: str
    run: Callable[[str], None]


class RefusedError(Exception):
    """The operation was refused, with this message."""


OPERATIONS: list[Operation] = []


def operation(group: str, name: str) -> Callable[[Callable[[str], None]], Callable[[str], None]]:
    """Register the decorated function as an operation."""

    def register(run: Callable[[str], None]) -> Callable[[str], None]:
        OPERATIONS.append(Operation(group, name, run))
        return run

    return register


@contextmanager
def may_be_refused() -> Iterator[None]:
    """Around the one step that may be refused: an error anywhere else is a defect of the operation or of ours."""
    try:
        yield
    except REFUSALS as error:
        raise RefusedError(f"{type(error).__name__}: {error}") from error


def outcome(run: Callable[[str], None], placement: str) -> str:
    """`works`, or the refusal's message."""
    try:
        run(placement)
    except RefusedError as refused:
        return str(refused)
    return "works"
