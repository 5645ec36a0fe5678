"""The whole update on the CPU: `result + σ · spline(s · h Bᵀ / σ)`, with h Bᵀ in chunks, made again for backward."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import reference
from .cpu import Passes

CHUNK = 1 << 20  # elements of h Bᵀ at a time: four megabytes


def forward(
    result: Tensor,
    h: Tensor,
    weight: Tensor,
    offsets: Tensor,
    input_scale_offset: Tensor | None,
    output_scale_offset: Tensor | None,
    stretch: Tensor,
    scaling: float,
    grid: reference.Grid,
) -> Tensor:
    """As `lslora.ops.update.update`, all float32."""
    out = torch.empty_like(result, memory_format=torch.contiguous_format)
    passes = Passes(offsets, input_scale_offset, output_scale_offset, grid, scaling, stretch, origin=1.0)
    for some_h, base, some_out in _chunks(weight, h, result.contiguous(), out):
        passes.forward(linear(some_h, weight), base, some_out)
    return out


def backward(
    grad_output: Tensor,
    h: Tensor,
    weight: Tensor,
    offsets: Tensor,
    input_scale_offset: Tensor | None,
    output_scale_offset: Tensor | None,
    stretch: Tensor,
    scaling: float,
    grid: reference.Grid,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `h`, `weight`, `offsets`, `input_scale_offset` and `output_scale_offset`, all float32."""
    grad_h = torch.empty_like(h, memory_format=torch.contiguous_format)
    grad_weight = torch.zeros_like(weight)
    passes = Passes(offsets, input_scale_offset, output_scale_offset, grid, scaling, stretch, origin=1.0)
    for some_h, g, some_grad_h in _chunks(weight, h, grad_output.contiguous(), grad_h):
        z = linear(some_h, weight)
        passes.backward(g, z, z)
        torch.matmul(z, weight, out=some_grad_h)
        grad_weight.addmm_(_rows(z).T, _rows(some_h))
    return grad_h, grad_weight, *passes.gradients()


def _chunks(weight: Tensor, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors, or equal parts of their rows, of at most `CHUNK` elements of h Bᵀ, but at least one row."""
    columns, r = weight.shape
    count = -(-tensors[0].numel() // r * columns // CHUNK)
    return [tensors] if count <= 1 else zip(*(_rows(tensor).chunk(count) for tensor in tensors), strict=True)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
