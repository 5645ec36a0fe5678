"""The piecewise spline on any device, in plain torch operations: forward, and the gradients written out.

Autograd through `offsets[index]` sorts and scatters in its backward; here the gradient of each offset is a reduction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference


def why_not(tensor: Tensor, offsets: Tensor) -> str | None:
    """None: it takes every tensor."""
    return None


def forward(
    z: Tensor,
    offsets: Tensor,
    input_scale: Tensor,
    output_scale: Tensor,
    grid: reference.Grid,
) -> Tensor:
    """As `lslora.ops.spline.spline`; computed in the dtype of the parameters, returned in that of `z`."""
    t = input_scale * reference.clamp(z.to(offsets.dtype), grid)
    return (output_scale * reference.piecewise_value(t, offsets, grid)).to(z.dtype)


def backward(
    grad_output: Tensor,
    z: Tensor,
    offsets: Tensor,
    input_scale: Tensor,
    output_scale: Tensor,
    grid: reference.Grid,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `z` (its dtype), `offsets`, `input_scale` and `output_scale` (the parameters' dtype)."""
    z, g = z.to(offsets.dtype), grad_output.to(offsets.dtype)
    c = reference.clamp(z, grid)
    t = input_scale * c
    grad_output_scale = (g * reference.piecewise_value(t, offsets, grid)).sum().view(1)
    g = g * output_scale
    num_knots, p = len(offsets), reference.position(t, len(offsets), grid)
    grad_offsets = torch.stack([(g * reference.knot_weight(p, i, num_knots)).sum() for i in range(num_knots)])
    g = g * reference.piecewise_slope(t, offsets, grid)
    grad_input_scale = (g * c).sum().view(1)
    grad_z = (g * input_scale * reference.inside(z, grid)).to(grad_output.dtype)
    return grad_z, grad_offsets, grad_input_scale, grad_output_scale
