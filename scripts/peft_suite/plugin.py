"""The pytest plugin of one run over peft's tests: chooses those about a configuration class and records how they end.

Reads from the environment: `SUITE_CLASS`, the name of the class (`LoraConfig` or `LSLoraConfig`), `SUITE_ONLY`, a JSON
file with the names of the tests to run or null for all, and `SUITE_OUT`, the JSON file written at the end: test →
[outcome, last line of the error].
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest

import lslora

NAME = os.environ["SUITE_CLASS"]
ONLY = json.loads(Path(os.environ["SUITE_ONLY"]).read_text(encoding="utf-8"))
RANK = {"passed": 0, "skipped": 1, "failed": 2}
found: dict[str, list[str]] = {}

# The rewritten tests import the class from wherever they import LoraConfig.
for module in (peft, peft.tuners, peft.tuners.lora, peft.tuners.lora.config):
    module.LSLoraConfig = lslora.LSLoraConfig
CLASS = getattr(peft, NAME)


def pytest_sessionstart(session: pytest.Session) -> None:
    """peft's tests go online when they first want a model; here it is in the cache, or the test fails at once."""
    from tests import testing_utils

    testing_utils.hub_online_once = lambda model_id: nullcontext()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = None if ONLY is None else set(ONLY)
    chosen = [item for item in items if (is_about_the_class(item) if wanted is None else item.nodeid in wanted)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def is_about_the_class(item: Any) -> bool:
    """By the configuration among its parameters; without one, by its source or that of its class."""
    parameters = list(flat(item.callspec.params)) if hasattr(item, "callspec") else []
    classes = [p if isinstance(p, type) else type(p) for p in parameters]
    configs = [c for c in classes if issubclass(c, peft.PeftConfig)]
    if configs:
        return CLASS in configs
    return any(NAME in source(part) for part in (item.function, item.cls) if part is not None)


def flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from flat(part)
    else:
        yield value


def source(part: Any) -> str:
    try:
        return inspect.getsource(part)
    except (OSError, TypeError):  # made at run time
        return ""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    before = found.get(report.nodeid, ["passed", ""])
    if RANK[report.outcome] >= RANK[before[0]]:
        found[report.nodeid] = [report.outcome, reason(report)]


def reason(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message[:2000] if crash else str(report.longrepr or "")[-2000:]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        Path(os.environ["SUITE_OUT"]).write_text(json.dumps(found, indent=0), encoding="utf-8")
