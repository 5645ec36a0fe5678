"""Time inference with an adapter: reading a prompt, and the next token after it.

    python -m benchmarks.inference --model smollm2 --out benchmarks/results/speed/inference_cpu.json

The models are those of `benchmarks.train_step`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import timing
from .layer import table
from .providers import CONFIGS
from .train_step import SHAPES, adapted

PROVIDERS = ("base", "peft_lora", "lslora", "lslora_recommended")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=("smollm2", *SHAPES), default="smollm2")
    parser.add_argument("--out", type=Path, required=True, help="JSON file that the record is added to")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--tokens", type=int, default=128, help="of every prompt")
    parser.add_argument("--providers", nargs="+", choices=CONFIGS, default=PROVIDERS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tested", action="store_true", help="the operations' tests have just passed")
    args = parser.parse_args(argv)
    environment = timing.ready(args.device, args.tested)
    models = {provider: adapted(provider, args.model, args.device).eval() for provider in args.providers}
    results = []
    for rows in args.batch:
        for phase in ("prefill", "decode"):
            steps = {name: step(model, rows, args.tokens, phase) for name, model in models.items()}
            seconds = timing.interleaved(steps, args.rounds, args.device)
            setting = {"model": f"{args.model}, {phase}", "shape": (rows, args.tokens), "tokens": rows * args.tokens}
            results += [
                setting
                | {"provider": name}
                | timing.summary(seconds[name])
                | {"peak_bytes": timing.peak_bytes(call, args.device)}
                for name, call in steps.items()
            ]
    record = {"benchmark": "inference", **environment, "results": results}
    timing.append(args.out, record)
    Console().print(table(results))
    return 0


def step(model: Any, rows: int, tokens: int, phase: str) -> timing.Step:
    """Read prompts of random tokens, or one token after them."""
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens), device=model.device)

    @torch.inference_mode()
    def prefill() -> Any:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    @torch.inference_mode()
    def decode() -> None:
        model(input_ids=ids[:, :1], past_key_values=cache, logits_to_keep=1)
        cache.crop(-1)

    if phase == "prefill":
        return prefill
    cache = prefill()
    return decode


if __name__ == "__main__":
    sys.exit(main())
