"""Time whole training steps of a model: forward, backward and AdamW, with each provider's adapter on all its layers.

    python -m benchmarks.train_step --model smollm2 --out benchmarks/results/speed/train_step_cpu.json

`smollm2` has its weights; any other name of `SHAPES` is built from its configuration with random weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, Phi3Config

from lslora.embedded import resolve_model_name

from . import timing
from .layer import table
from .providers import CONFIGS, attach

# microsoft/Phi-3-mini-4k-instruct, config.json
SHAPES = {
    "Phi-3-mini": Phi3Config(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    )
}
PROVIDERS = ("peft_lora", "lslora", "lslora_recommended", "seed_naive")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=("smollm2", *SHAPES), default="smollm2")
    parser.add_argument("--out", type=Path, required=True, help="JSON file that the record is added to")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="of every row")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--lora_dropout", type=float, default=0.0)
    parser.add_argument("--providers", nargs="+", choices=CONFIGS, default=PROVIDERS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tested", action="store_true", help="the operations' tests have just passed")
    args = parser.parse_args(argv)
    environment = timing.ready(args.device, args.tested)
    steps = {
        provider: train_step(adapted(provider, args.model, args.device, args.lora_dropout), args)
        for provider in args.providers
    }
    seconds = timing.interleaved(steps, args.rounds, args.device)
    setting = {
        "model": args.model,
        "shape": (args.rows, args.tokens),
        "tokens": args.rows * args.tokens,
        "gradient_checkpointing": args.gradient_checkpointing,
        "lora_dropout": args.lora_dropout,
    }
    results = [
        setting
        | {"provider": name}
        | timing.summary(seconds[name])
        | {"peak_bytes": timing.peak_bytes(step, args.device)}
        for name, step in steps.items()
    ]
    record = {"benchmark": "train_step", **environment, "results": results}
    timing.append(args.out, record)
    Console().print(table(results))
    return 0


def adapted(provider: str, name: str, device: str, lora_dropout: float = 0.0) -> Any:
    """The model with the provider's adapter; fp32 on the CPU, bf16 on CUDA."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if name in SHAPES:
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(SHAPES[name], dtype=dtype)
    else:
        base = AutoModelForCausalLM.from_pretrained(resolve_model_name(name), dtype=dtype)
        base.to(device)  # type: ignore[arg-type]
    return attach(base, provider, lora_dropout=lora_dropout)


def train_step(model: Any, args: argparse.Namespace) -> timing.Step:
    """A step on random tokens, the same for every provider."""
    model.train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    # What transformers' trainers step with unless told otherwise.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.randint(0, model.config.vocab_size, (args.rows, args.tokens), device=args.device)

    def step() -> None:
        with timing.autocast(args.device):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    sys.exit(main())
