"""The piecewise spline on any device, in plain torch operations: forward, and the gradients written out.

Autograd through `offsets[index]` sorts and scatters in its backward; here the gradient of each offset is a reduction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference


def why_not(tensor: Tensor, dtype: torch.dtype) -> str | None:
    """None: it takes every tensor."""
    return None


def forward(
    z: Tensor,
    offsets: Tensor,
    input_scale: Tensor,
    output_scale: Tensor,
    k_min: float,
    k_max: float,
    extrapolation: str,
) -> Tensor:
    """As `lslora.ops.spline.spline`; computed in the dtype of the parameters, returned in that of `z`."""
    t = input_scale * reference.clamp(z.to(offsets.dtype), k_min, k_max, extrapolation)
    return (output_scale * reference.piecewise_value(t, offsets, k_min, k_max, extrapolation)).to(z.dtype)


def backward(
    grad_output: Tensor,
    z: Tensor,
    offsets: Tensor,
    input_scale: Tensor,
    output_scale: Tensor,
    k_min: float,
    k_max: float,
    extrapolation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `z` (its dtype), `offsets`, `input_scale` and `output_scale` (the parameters' dtype)."""
    shape = (k_min, k_max, extrapolation)
    z, g = z.to(offsets.dtype), grad_output.to(offsets.dtype)
    c = reference.clamp(z, *shape)
    t = input_scale * c
    grad_output_scale = (g * reference.piecewise_value(t, offsets, *shape)).sum().view(1)
    g = g * output_scale
    num_knots, p = len(offsets), reference.position(t, len(offsets), *shape)
    grad_offsets = torch.stack([(g * reference.knot_weight(p, i, num_knots)).sum() for i in range(num_knots)])
    g = g * reference.piecewise_slope(t, offsets, *shape)
    grad_input_scale = (g * c).sum().view(1)
    grad_z = (g * input_scale * reference.inside(z, *shape)).to(grad_output.dtype)
    return grad_z, grad_offsets, grad_input_scale, grad_output_scale
