"""Time one adapted linear layer, forward and backward, on the shapes of real models.

    python -m benchmarks.layer --device cpu --out benchmarks/results/speed/layer_cpu.json

runs the operations' tests, times all providers in turn (`benchmarks.providers`; fp32 on the CPU, bf16 under autocast
on CUDA), prints ratios to peft's LoRA, and adds a record to the file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from . import timing
from .providers import CONFIGS, attach

# (in, out) of every kind of linear layer in a block.
SHAPES = {
    "SmolLM2-135M": [(576, 576), (576, 192), (576, 1536), (1536, 576)],
    "Phi-3-mini": [(3072, 9216), (3072, 3072), (3072, 16384), (8192, 3072)],
    "Llama-3-8B": [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)],
}
TOKENS = {"cpu": [512, 2048], "cuda": [4096, 16384]}
BASELINE = "peft_lora"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="JSON file that the record is added to")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens in the batch; by default as the device bears")
    parser.add_argument("--providers", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--replayed", action="store_true", help="on CUDA, as graphs: without Python's time")
    parser.add_argument("--tested", action="store_true", help="the operations' tests have just passed")
    args = parser.parse_args(argv)
    if args.replayed and args.device != "cuda":
        parser.error("--replayed needs --device cuda")
    environment = timing.ready(args.device, args.tested)
    cases = [
        (model, shape, tokens)
        for tokens in args.tokens or TOKENS[args.device]
        for model in args.models
        for shape in SHAPES[model]
    ]
    results = []
    for model, shape, tokens in track(cases, description="layers", disable=not sys.stderr.isatty()):
        for provider, found in measure(shape, tokens, args).items():
            results.append({"model": model, "shape": shape, "tokens": tokens, "provider": provider, **found})
    name = "layer, replayed" if args.replayed else "layer"
    record = {"benchmark": name, **environment, "results": results}
    timing.append(args.out, record)
    Console().print(table(results))
    return 0


def measure(shape: tuple[int, int], tokens: int, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Times and peak memory of one layer for every provider."""
    steps = {provider: layer_step(provider, shape, tokens, args.device) for provider in args.providers}
    timed = {name: timing.captured(step) for name, step in steps.items()} if args.replayed else steps
    seconds = timing.interleaved(timed, args.rounds, args.device)
    return {
        name: timing.summary(seconds[name]) | {"peak_bytes": timing.peak_bytes(step, args.device)}
        for name, step in steps.items()
    }


def layer_step(provider: str, shape: tuple[int, int], tokens: int, device: str) -> timing.Step:
    """One forward and backward pass through an adapted layer whose input needs a gradient, as all but the first do."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base = nn.Sequential(nn.Linear(*shape, bias=False, device=device, dtype=dtype))
    model = attach(base, provider, ["0"])
    x = torch.randn(tokens, shape[0], device=device, dtype=dtype, requires_grad=True)
    g = torch.randn(tokens, shape[1], device=device, dtype=dtype)
    leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]

    def step() -> None:
        with timing.autocast(device):
            y = model(x)
        y.backward(g)
        for leaf in leaves:
            leaf.grad = None

    return step


def ratios(results: list[dict[str, Any]], key: str) -> dict[str, dict[str, float]]:
    """Model → provider → geometric mean over its shapes and tokens of `key` divided by that of peft's LoRA."""
    values = {(r["model"], tuple(r["shape"]), r["tokens"], r["provider"]): r[key] for r in results}
    found: dict[str, dict[str, list[float]]] = {}
    for (model, shape, tokens, provider), value in values.items():
        baseline = values[model, shape, tokens, BASELINE]
        for name in (model, "all"):
            found.setdefault(name, {}).setdefault(provider, []).append(value / baseline)
    return {model: {p: geometric_mean(r) for p, r in by.items()} for model, by in found.items()}


def table(results: list[dict[str, Any]]) -> Table:
    time_ratios, memory = ratios(results, "median"), ratios(results, "peak_bytes")
    shown = Table(title=f"time, and (peak memory), over {BASELINE}'s")
    providers = list(dict.fromkeys(r["provider"] for r in results))
    for heading in ("", *providers):
        shown.add_column(heading, justify="left" if not heading else "right")
    for model, by in time_ratios.items():
        shown.add_row(model, *(f"{by[p]:.3f} ({memory[model][p]:.3f})" for p in providers))
    return shown


if __name__ == "__main__":
    sys.exit(main())
