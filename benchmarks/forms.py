"""Elementwise nonlinearities in LoRA's update, for finding out which are worth having: relatives, controls, sketches.

    output      y = W0 x + φ(s B A x)
    bottleneck  y = W0 x + s B φ(A x)
    weight      y = W0 x + φ(s B A) x
    factor      y = W0 x + s φ(B) A x

φ works on the scale of its input: `φ(z) = σ ψ(z / σ)` with ψ of order one. In the bottleneck `σ` is `width` times a
quantile of |z| in the first batch (of the layer, or of each rank channel); elsewhere z is zero at first, and `σ` is
the number `width` itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn
from torch.nn.functional import gelu, leaky_relu, linear, softshrink
from torch.optim import Optimizer

from .elsewhere import QUANTILE, Delta

FIXED = {
    "identity": lambda t: t,
    "leaky": lambda t: leaky_relu(t, 0.5),
    "gelu": lambda t: gelu(4 * t) / 4,
    "sinh": lambda t: (2 * t).sinh() / 2,
    "dead_zone": lambda t: softshrink(t, 0.25),
    "clip": lambda t: t.clamp(-1, 1),
    "sine": lambda t: (math.pi * t).sin() / math.pi,
}


class Form(nn.Module):
    """`output_scale · σ ψ(z / σ)`: ψ is a named shape plus, with `knots`, a learnable piecewise linear function.

    With `unit` the result stays in units of σ: `output_scale · ψ(z / σ)`.
    """

    sigma: Tensor

    def __init__(
        self,
        channels: int,
        width: float,
        shape: str,
        knots: int,
        learns: Collection[str],
        calibrated: bool,
        unit: bool,
    ) -> None:
        super().__init__()
        self.shape, self.width, self.calibrated, self.unit = FIXED[shape], width, calibrated, unit
        self.register_buffer("sigma", torch.zeros(channels) if calibrated else torch.full((1,), width))
        self.offsets = nn.Parameter(torch.zeros(channels, knots), requires_grad="offsets" in learns)
        self.output_scale = nn.Parameter(torch.ones(1), requires_grad="output_scale" in learns)

    def forward(self, z: Tensor) -> Tensor:
        if self.calibrated and not self.sigma.any():
            per_channel = z.detach().abs().flatten(0, -2) if len(self.sigma) > 1 else z.detach().abs().reshape(-1, 1)
            self.sigma.copy_(self.width * per_channel.quantile(QUANTILE, dim=0))
        t = z / self.sigma
        psi = self.shape(t)
        if self.offsets.shape[1] and self.offsets.requires_grad:
            psi = psi + self.bend(t)
        return self.output_scale * (psi if self.unit else self.sigma * psi)

    def bend(self, t: Tensor) -> Tensor:
        """Straight lines between learnable heights at knots evenly spaced on [−1, 1], constant beyond."""
        channels, knots = self.offsets.shape
        p = (t.clamp(-1, 1) + 1) * (knots - 1) / 2
        j = p.detach().floor().clamp(max=knots - 2).long()
        start = torch.arange(channels, device=t.device) * knots
        left, right = self.offsets.take(j + start), self.offsets.take(j + 1 + start)
        return torch.lerp(left, right, p - j)


class FormVariant(LoraVariant):
    def __init__(self, placement: str) -> None:
        self.placement = placement

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scaling, form = module.scaling[active_adapter], module.lora_form
        if self.placement == "output":
            return result + form(b(a(x)) * scaling)
        if self.placement == "bottleneck":
            return result + b(form(a(x))) * scaling
        if self.placement == "factor":
            return result + linear(a(x), form(b.weight)) * scaling
        return result + linear(x, form(b.weight @ a.weight * scaling))


def attach_forms(
    model: nn.Module,
    placement: str,
    shape: str = "identity",
    width: float = 1.0,
    knots: int = 0,
    learns: Collection[str] = (),
    per_channel: bool = False,
    unit: bool = False,
) -> None:
    """Send the update of every plain LoRA layer in `model` through a form of its own."""
    for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
        channels = layer.r["default"] if per_channel else 1
        layer.lora_form = Form(channels, width, shape, knots, learns, placement == "bottleneck", unit)
        layer.lora_variant["default"] = FormVariant(placement)


def separate_form_group(optimizer: Optimizer, model: nn.Module, lr: float) -> None:
    """Move what of forms and deltas is trained into a group with a learning rate of its own."""
    modules = (m for m in model.modules() if isinstance(m, (Form, Delta)))
    forms = {id(p): p for m in modules for p in m.parameters() if p.requires_grad}
    if not forms:
        return
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in forms]
    optimizer.add_param_group({"params": list(forms.values()), "lr": lr, "weight_decay": 0.0})
