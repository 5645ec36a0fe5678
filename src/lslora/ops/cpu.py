"""The piecewise spline on the CPU, chunk by chunk: large temporaries cost more there than arithmetic.

With the position `p = (t − k_min) / Δk` and the ramps `ramp_i(p) = clamp(p − i, 0, 1)` between knot i and knot i + 1
(the first without lower, the last without upper limit for linear extrapolation),

    φ(t) = t + offset_0 + Σ_i (offset_{i+1} − offset_i) · ramp_i(p)

so with `G = Σ g` and `R_i = Σ g · ramp_i` the gradient of offset_i is `R_{i−1} − R_i`, with `R_{−1} = G` and
`R_{K−1} = 0`.
A ramp that all elements have passed is exactly 1 everywhere, so the gradient of a knot nobody reaches is exactly 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from operator import mul

import torch
from torch import Tensor

from . import reference

CHUNK = 1 << 16  # elements; the handful of buffers of a chunk stays in the cache


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
    shape = _Shape.of(offsets, k_min, k_max, extrapolation)
    scale_in, scale_out = input_scale.item(), output_scale.item()
    out = torch.empty(z.shape, dtype=z.dtype)
    for z_chunk, out_chunk in zip(z.reshape(-1).split(CHUNK), out.view(-1).split(CHUNK), strict=True):
        t = z_chunk.to(offsets.dtype, copy=True)
        shape.clamp_(shape.clamp_(t).mul_(scale_in))
        p = shape.position(t)
        ramp = torch.empty_like(p)
        t.add_(shape.first)
        for i, rise in enumerate(shape.rises):
            t.add_(shape.ramp(p, i, ramp), alpha=rise)
        out_chunk.copy_(t.mul_(scale_out))
    return out


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
    shape = _Shape.of(offsets, k_min, k_max, extrapolation)
    scale_in, scale_out = input_scale.item(), output_scale.item()
    grad_z = torch.empty(z.shape, dtype=z.dtype)
    total, total_t, total_c = 0.0, 0.0, 0.0  # Σ g, Σ g · t and Σ g · φ'(t) · c, all over the unscaled gradient g
    ramps = [0.0] * len(shape.rises)
    chunks = (tensor.reshape(-1).split(CHUNK) for tensor in (z, grad_output, grad_z))
    for z_chunk, g_chunk, grad_z_chunk in zip(*chunks, strict=True):
        g = g_chunk.to(offsets.dtype)
        c = shape.clamp_(z_chunk.to(offsets.dtype, copy=True))
        t = c * scale_in
        outside = shape.outside(t)
        p = shape.position(shape.clamp_(t))
        buffer = torch.ones_like(p)
        total += torch.dot(g, buffer).item()
        total_t += torch.dot(g, t).item()
        for i in range(len(ramps)):
            ramps[i] += torch.dot(g, shape.ramp(p, i, buffer)).item()
        g = shape.slope(p, buffer).mul_(g)
        if outside is not None:
            g.masked_fill_(outside, 0.0)
        total_c += torch.dot(g, c).item()
        outside = shape.outside(z_chunk)
        if outside is not None:
            g.masked_fill_(outside, 0.0)
        grad_z_chunk.copy_(g.mul_(scale_in * scale_out))
    sums = [total, *ramps, 0.0]
    value = total_t + shape.first * total + sum(map(mul, shape.rises, ramps))
    return (
        grad_z,
        offsets.new_tensor([scale_out * (left - right) for left, right in pairwise(sums)]),
        input_scale.new_tensor([scale_out * total_c]),
        output_scale.new_tensor([value]),
    )


@dataclass
class _Shape:
    """The grid and the offsets as numbers, and the steps on buffers that forward and backward share."""

    k_min: float
    k_max: float
    clamps: bool
    spacing: float
    first: float  # offset_0
    rises: list[float]  # offset_{i+1} − offset_i

    @classmethod
    def of(cls, offsets: Tensor, k_min: float, k_max: float, extrapolation: str) -> _Shape:
        numbers = offsets.tolist()
        rises = [right - left for left, right in pairwise(numbers)]
        spacing = reference.spacing(len(numbers), k_min, k_max)
        return cls(k_min, k_max, extrapolation == "clamp", spacing, numbers[0], rises)

    def clamp_(self, t: Tensor) -> Tensor:
        return t.clamp_(self.k_min, self.k_max) if self.clamps else t

    def outside(self, t: Tensor) -> Tensor | None:
        return (t < self.k_min).logical_or_(t > self.k_max) if self.clamps else None

    def position(self, t: Tensor) -> Tensor:
        return (t - self.k_min).div_(self.spacing)

    def ramp(self, p: Tensor, i: int, out: Tensor) -> Tensor:
        low = 0.0 if i > 0 or self.clamps else -math.inf
        high = 1.0 if i < len(self.rises) - 1 or self.clamps else math.inf
        return torch.sub(p, i, out=out).clamp_(low, high)

    def slope(self, p: Tensor, out: Tensor) -> Tensor:
        out.fill_(1 + self.rises[0] / self.spacing)
        for i in range(1, len(self.rises)):
            out.add_(p >= i, alpha=(self.rises[i] - self.rises[i - 1]) / self.spacing)
        return out
