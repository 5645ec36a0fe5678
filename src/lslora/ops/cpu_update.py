"""The whole update on the CPU: `result + σ · spline(s · h Bᵀ / σ)`, with h Bᵀ in chunks, made again for backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference
from .cpu import Passes

CHUNK = 1 << 20  # elements of h Bᵀ at a time: four megabytes


def forward(
    result: Tensor,
    h: Tensor,
    weight: Tensor,
    offsets: Tensor,
    input_scale: Tensor,
    output_scale: Tensor,
    stretch: Tensor,
    scaling: float,
    grid: reference.Grid,
) -> Tensor:
    """As `lslora.ops.update.update`, with `result` (N, out) and `h` (N, r) float32."""
    out = torch.empty_like(result, memory_format=torch.contiguous_format)
    passes = Passes(offsets, input_scale, output_scale, grid, scaling, stretch)
    for some_h, base, some_out in _chunks(weight, h, result.contiguous(), out):
        passes.forward(torch.mm(some_h, weight.T), base, some_out)
    return out


def backward(
    grad_output: Tensor,
    h: Tensor,
    weight: Tensor,
    offsets: Tensor,
    input_scale: Tensor,
    output_scale: Tensor,
    stretch: Tensor,
    scaling: float,
    grid: reference.Grid,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `h`, `weight`, `offsets`, `input_scale` and `output_scale`, all float32."""
    grad_h, grad_weight = torch.empty_like(h), torch.zeros_like(weight)
    passes = Passes(offsets, input_scale, output_scale, grid, scaling, stretch)
    for some_h, g, some_grad_h in _chunks(weight, h, grad_output.contiguous(), grad_h):
        z = torch.mm(some_h, weight.T)
        passes.backward(g, z, z)
        torch.mm(z, weight, out=some_grad_h)
        grad_weight.addmm_(z.T, some_h)
    return grad_h, grad_weight, *passes.gradients()


def _chunks(weight: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Equal parts of the rows of all the tensors, of at most `CHUNK` elements of h Bᵀ, but at least one row."""
    count = -(-tensors[0].shape[0] * weight.shape[0] // CHUNK)
    if count <= 1:
        return iter([tensors])
    return zip(*(tensor.chunk(count) for tensor in tensors), strict=True)
