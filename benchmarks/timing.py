"""Timing things side by side: every round times each of them once, so that what disturbs one disturbs all."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from .runs import commit

ROOT = Path(__file__).parent.parent
TESTS = ("tests/test_ops.py", "tests/test_update.py")
PACKAGES = ("lslora", "peft", "torch", "transformers")

Step = Callable[[], Any]


def check_tests() -> None:
    """Run the operations' tests; RuntimeError unless they pass: the speed of something wrong is of no interest."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command = [sys.executable, "-m", "pytest", "-q", "-x", *TESTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the operations' tests fail, so nothing is timed:\n{done.stdout[-3000:]}")


def ready(device: str, tested: bool) -> dict[str, Any]:
    """`environment`, asked for before anything is timed, and the tests run unless they were just now."""
    found = environment(device)
    if not tested:
        check_tests()
    return found


def interleaved(steps: dict[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every step in every round, after one round that does not count."""
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        shift = turn % len(names)  # nobody always comes after the same one
        for name in names[shift:] + names[:shift]:
            synchronize(device)
            started = time.perf_counter()
            steps[name]()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def captured(step: Step) -> Step:
    """A step as a CUDA graph that is replayed: what the GPU does in it, without the time that calling it takes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # where torch wants what is captured to have run before
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def autocast(device: str) -> AbstractContextManager[Any]:
    """bf16 on CUDA, as half-precision training has it; nothing on the CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(step: Step, device: str) -> int:
    """The most memory that tensors made in a step hold at once, over what there was before, in bytes."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum([0, *changes]).max())


def summary(seconds: list[float]) -> dict[str, Any]:
    """Median and the 20 % and 80 % quantiles, with all there is."""
    p20, median, p80 = np.quantile(seconds, [0.2, 0.5, 0.8]).tolist()
    return {"median": median, "p20": p20, "p80": p80, "seconds": seconds}


def environment(device: str) -> dict[str, Any]:
    """Where and with what something was timed."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit(),
    }


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a record to a file that holds a JSON list of them."""
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps([*records, record], indent=1), encoding="utf-8")
    os.replace(temporary, path)
