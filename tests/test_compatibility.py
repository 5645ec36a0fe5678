"""docs/compatibility.md says what happens: all of its operations are run again."""

from functools import cache
from pathlib import Path

import pytest

from tests.compatibility import page
from tests.compatibility.registry import OPERATIONS, may_be_refused, outcome

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"


@cache
def rows():
    return dict(line.split(" | ", 1) for line in PAGE.read_text(encoding="utf-8").splitlines() if " | " in line)


@pytest.mark.parametrize("op", OPERATIONS, ids=lambda op: f"{op.group}: {op.name}")
@pytest.mark.filterwarnings("ignore")
def test_the_page_says_what_happens(op):
    [(_, outcomes)] = page.results(lambda operations: [op])
    assert rows()[f"| {page.escape(op.name)}"] == f"{page.cell(outcomes)} |"


def test_the_page_has_no_other_rows():
    titles = [line for line in rows() if line != "| operation"]
    assert titles == [f"| {page.escape(op.name)}" for op in OPERATIONS]


def test_only_the_marked_step_may_be_refused():
    def refuses(placement):
        with may_be_refused():
            raise ValueError("no")

    def is_broken(placement):
        raise ValueError("no")

    assert outcome(refuses, "output") == "ValueError: no"
    with pytest.raises(ValueError, match="no"):
        outcome(is_broken, "output")
