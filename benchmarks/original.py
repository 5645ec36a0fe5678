"""The defects of the first implementation as switches on the library's spline, for the ablation only.

| switch | what it brings back (number in FIXES_APPLIED.md) |
|---|---|
| `wavy_start` | heights that start at `k + 0.2 sin(πk)` (1) |
| `tanh` | the spline's input squashed by tanh (3) |
| `small_output` | an output scale that starts at 0.1 (4) |

The grid (2), soft interpolation (5), the penalty's weight (6) and the learning rate (7) are settings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lslora.spline import splines_of


def break_splines(
    model: nn.Module, *, wavy_start: bool = False, tanh: bool = False, small_output: bool = False
) -> None:
    """Put the chosen defects into every spline of `model`, in place."""
    for spline in splines_of(model):
        if wavy_start:
            spline.values = spline.grid + 0.2 * torch.sin(torch.pi * spline.grid)
        if tanh:
            spline.register_forward_pre_hook(_squash)
        if small_output:
            spline.output_scale = 0.1


def _squash(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return (args[0].tanh(), *args[1:])
