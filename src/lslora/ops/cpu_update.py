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
    base, out = result.contiguous(), torch.empty_like(result, memory_format=torch.contiguous_format)
    passes = Passes(offsets, input_scale, output_scale, grid, scaling, stretch)
    for rows, z in _chunks(h, weight):
        passes.forward(z, base[rows], out[rows])
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
    g = grad_output.contiguous()
    grad_h, grad_weight = torch.empty_like(h), torch.zeros_like(weight)
    passes = Passes(offsets, input_scale, output_scale, grid, scaling, stretch)
    for rows, z in _chunks(h, weight):
        passes.backward(g[rows], z, z)
        torch.mm(z, weight, out=grad_h[rows])
        grad_weight.addmm_(z.T, h[rows])
    return grad_h, grad_weight, *passes.gradients()


def _chunks(h: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows and their `h weightᵀ`, which the next one overwrites."""
    count = max(1, CHUNK // max(1, len(weight)))
    buffer = h.new_empty(min(count, len(h)), len(weight))
    for start in range(0, len(h), count):
        rows = slice(start, min(start + count, len(h)))
        yield rows, torch.mm(h[rows], weight.T, out=buffer[: rows.stop - start])
