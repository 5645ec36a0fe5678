"""What is timed: a bare model, one with adapters of peft, with ours, and with plainer ways to compute ours."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lslora import LSLoraConfig, Spline
from lslora.ops import reference
from lslora.spline import splines_of

R, ALPHA = 16, 32

CONFIGS: dict[str, Any] = {
    "base": None,
    "peft_lora": LoraConfig,
    "peft_dora": partial(LoraConfig, use_dora=True),
    "lslora": LSLoraConfig,
    "lslora_recommended": partial(LSLoraConfig.recommended, calibration_steps=1),
    "lslora_reference": LSLoraConfig,
    "seed_naive": LSLoraConfig,
}


class ReferenceSpline(Spline):
    """The formula in plain torch, differentiated by autograd."""

    def forward(self, z: Tensor) -> Tensor:
        grid = reference.Grid(self.k_min, self.k_max, self.extrapolation)
        parameters = self.weight, self.input_scale, self.output_scale
        return reference.spline(
            z,
            *parameters,
            grid,
            interpolation_method=self.interpolation_method,
            soft_temperature=self.soft_temperature,
        )


class NaiveSpline(Spline):
    """As a first implementation would: find the interval with `bucketize`, gather the heights on both sides."""

    def forward(self, z: Tensor) -> Tensor:
        knots, values = self.grid, self.values
        t = (self.input_scale * z.clamp(self.k_min, self.k_max)).clamp(self.k_min, self.k_max)
        j = (torch.bucketize(t, knots) - 1).clamp(0, self.num_knots - 2)
        left, right = knots[j], knots[j + 1]
        share = (t - left) / (right - left)
        return self.output_scale * (values[j] + share * (values[j + 1] - values[j]))


DOUBLES = {"lslora_reference": ReferenceSpline, "seed_naive": NaiveSpline}


def attach(
    model: nn.Module, provider: str, targets: str | list[str] = "all-linear", lora_dropout: float = 0.0
) -> nn.Module:
    """The provider's adapter of rank 16 on `model`, B and the splines away from where they start; the base frozen."""
    if CONFIGS[provider] is None:
        return model.requires_grad_(False)
    config = CONFIGS[provider](r=R, lora_alpha=ALPHA, lora_dropout=lora_dropout, target_modules=targets)
    peft_model = get_peft_model(model, config)
    for spline in splines_of(peft_model):
        if spline.grid_scale is not None:
            spline.calibrate(1.0)
        if provider in DOUBLES:
            spline.__class__ = DOUBLES[provider]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name or "lora_spline" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return peft_model
