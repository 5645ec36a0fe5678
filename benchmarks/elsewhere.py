"""A learnable piecewise linear function δ for each layer, in more places than lslora's spline has: sketches.

    input   y = W0 x + s B A (x + δ(x))
    whole   y = z + δ(z),                 z = W0 x + s B A x
    token   y = W0 x + s B (1 + δ(t)) h,  h = A x, t = |h|: one factor for each token, by the size of its h
    gate    y = W0 x + (1 + δ(W0 x)) ⊙ s B A x: one factor for each element, by what it is added to
    factor  y = W0 x + s (B + δ(B)) A x: merges, and costs nothing per token
    base    y = W0 x + ((1 + δ(W0)) ⊙ s B A) x: one factor for each weight, by the weight it is added to; merges
    product y = W0 x + ((W0 / rms(W0) + δ(W0)) ⊙ s B A) x: the same from HiRA instead of LoRA, on LoRA's scale
    output, bottleneck      as lslora's, constant beyond the grid's ends

With `gated` δ is a number, learned from 0, times a function that starts as a sine. With one knot δ is a number: a
learned scalar, by `token`.
δ starts at zero, so all but `product` start as plain LoRA and stay it for the first `waits` batches; then δ's knots
are spread over what the layer sees in that batch, and are trained from there on.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn
from torch.nn.functional import linear

QUANTILE = 0.99
FACTORS = ("token", "gate", "base", "product")  # δ is a number without a unit; elsewhere it has that of its argument


class Delta(nn.Module):
    """`δ(t) = u · lerp(offsets, t / σ)`: knots evenly spaced on [−σ, σ], constant beyond; `in_sigma` makes u σ, not 1.

    σ is the 99 % quantile of |t| in batch number `waits` of the training.
    """

    def __init__(self, knots: int, waits: int, in_sigma: bool, gated: bool) -> None:
        super().__init__()
        self.waits, self.in_sigma, self.batches = waits, in_sigma, 0
        self.sigma: Tensor | None = None
        self.offsets = nn.Parameter((torch.linspace(-1, 1, knots) * math.pi).sin() * gated)
        self.gate = nn.Parameter(torch.zeros(())) if gated else 1.0

    def forward(self, t: Tensor) -> Tensor:
        if self.training:
            self.batches += 1
        if self.sigma is None:
            if self.batches < self.waits:
                return torch.zeros_like(t)
            size = t.detach().abs().flatten()
            self.sigma = size[:: max(1, len(size) // 1_000_000)].quantile(QUANTILE)
        last = len(self.offsets) - 1
        p = ((t / self.sigma).clamp(-1, 1) + 1) * last / 2
        weights = [(1 - (p - i).abs()).clamp(min=0) for i in range(last + 1)]
        delta = sum(weight * offset for weight, offset in zip(weights, self.offsets, strict=True)) * self.gate
        return delta * self.sigma if self.in_sigma else delta


class DeltaVariant(LoraVariant):
    def __init__(self, place: str) -> None:
        self.place = place

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scaling, delta = module.scaling[active_adapter], module.lora_delta
        if self.place == "input":
            return result + b(a(x + delta(x))) * scaling
        h = a(x)
        if self.place == "token":
            return result + b(h * (1 + delta(h.norm(dim=-1, keepdim=True)))) * scaling
        if self.place == "factor":
            return result + linear(h, b.weight + delta(b.weight)) * scaling
        if self.place in ("base", "product"):
            w0 = module.base_layer.weight
            start = 1 if self.place == "base" else w0 / w0.square().mean().sqrt()
            return result + linear(x, (b.weight @ a.weight) * (start + delta(w0))) * scaling
        if self.place == "bottleneck":
            return result + b(h + delta(h)) * scaling
        z = b(h) * scaling
        if self.place == "gate":
            return result + z * (1 + delta(result))
        if self.place == "output":
            return result + z + delta(z)
        return result + z + delta(result + z)


def attach_deltas(model: nn.Module, place: str, knots: int, waits: int, gated: bool = False) -> None:
    """Give every plain LoRA layer in `model` a δ of its own."""
    for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
        layer.lora_delta = Delta(knots, waits, in_sigma=place not in FACTORS, gated=gated)
        layer.lora_variant["default"] = DeltaVariant(place)
