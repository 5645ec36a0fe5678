"""Time the update's kernels on a GPU, apart from the layer around them, against the bytes that they must move.

    python -m benchmarks.kernels --out benchmarks/results/speed/kernels_cuda.json

The update of a linear layer, `result + φ(s h Bᵀ)` at r = 16 in bf16, and plain LoRA's in peft's operations. A time is
what the kernels take by torch's profiler, without the gaps between them; the floor is a copy's rate on the same GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lslora import Spline

from . import timing
from .providers import ALPHA, CONFIGS, R

OUT = (3072, 9216, 16384)  # of Phi-3-mini's layers
TOKENS = (4096, 16384)
REPEATS = 10
WHERE: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
# Tensors of tokens × out that are read or written at least: the result and the sum, and the gradient.
FLOOR = {"forward": 2, "backward": 1}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file that the record is added to")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    environment = timing.environment("cuda")
    results = [found for tokens in TOKENS for out in OUT for found in measure(tokens, out)]
    timing.append(args.out, {"benchmark": "kernels", **environment, "results": results})
    Console().print(table(results))
    return 0


def measure(tokens: int, out: int) -> list[dict[str, Any]]:
    """Both passes of every way to compute an update, and the floor under each."""
    torch.manual_seed(0)
    result, h = (torch.randn(tokens, size, **WHERE).requires_grad_() for size in (out, R))
    b = (0.3 * torch.randn(out, R, device=WHERE["device"])).requires_grad_()
    target, found = torch.empty_like(result), []
    copy = sum(kernel_times(lambda: target.copy_(result.detach())).values())
    for name in ("peft_lora", "lslora", "lslora_recommended"):
        compute, learned = way(name, b)
        y, leaves = compute(result, h), (result, h, b, *learned)
        passes: dict[str, Callable[[], Any]] = {
            "forward": partial(compute, result, h),
            "backward": partial(torch.autograd.grad, y, leaves, target, retain_graph=True),
        }
        for name_of_pass, call in passes.items():
            kernels = kernel_times(call)
            setting = {"tokens": tokens, "out": out, "way": name, "pass": name_of_pass, "kernels": kernels}
            found.append(setting | {"seconds": sum(kernels.values()), "floor": copy * FLOOR[name_of_pass] / 2})
    return found


def way(name: str, b: Tensor) -> tuple[Callable[[Tensor, Tensor], Tensor], list[nn.Parameter]]:
    """The update as a function of the result and h, and what it learns but B."""
    scaling = ALPHA / R
    if name == "peft_lora":
        return lambda result, h: result + (h @ b.to(h.dtype).T) * scaling, []
    spline = Spline(CONFIGS[name](r=R)).to(b.device)
    if spline.grid_scale is not None:
        spline.calibrate(1.0)
    with torch.no_grad():
        spline.weight.normal_(std=0.02)
    return lambda result, h: cast(Tensor, spline.update(result, h, b, scaling)), list(spline.parameters())


def kernel_times(call: timing.Step) -> dict[str, float]:
    """Seconds of every kernel in a call, the mean of several."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(REPEATS):
            call()
        torch.cuda.synchronize()
    events = [event for event in recorded.key_averages() if event.self_device_time_total]
    return {event.key: event.self_device_time_total * 1e-6 / REPEATS for event in events}


def table(results: list[dict[str, Any]]) -> Table:
    """Microseconds, and (times the floor)."""
    names = list(dict.fromkeys(found["way"] for found in results))
    shown = Table("tokens", "out", "pass", *names, title="µs of the kernels, and (over the time of the bytes)")
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for found in results:
        row = rows.setdefault((str(found["tokens"]), str(found["out"]), found["pass"]), {})
        row[found["way"]] = f"{found['seconds'] * 1e6:.0f} ({found['seconds'] / found['floor']:.2f})"
    for key, row in rows.items():
        shown.add_row(*key, *(row[name] for name in names))
    return shown


if __name__ == "__main__":
    sys.exit(main())
