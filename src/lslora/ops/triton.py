"""The piecewise spline on CUDA: one kernel forward, one backward; see `reference` for the mathematics and notation.

All gradients of the spline follow from the sum of g and one sum an interval, `C[j] = Σ g ramp_j(p)`, where ramp_j
rises from 0 to 1 over interval j: the hat of knot i is `ramp_(i−1) − ramp_i`. Every program adds up its elements and
writes its sums to a place of its own, so there are no atomics, two runs give the same bits, and a knot without
elements beside it gets an exact zero: the same numbers are added up in the same order on both sides of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .tracing import why_hidden

TILE = 1024  # elements at a time
MAX_PROGRAMS = 1024


@triton.jit
def clamp(x, low, high):  # a NaN falls through both comparisons unchanged
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def place(z, scale_in, k_min, k_max, per_spacing, last: tl.constexpr, clamps: tl.constexpr):
    """c (the clamped z), t, u (the clamped t), the position p and its interval j."""
    c = clamp(z, k_min, k_max) if clamps else z
    t = scale_in * c
    u = clamp(t, k_min, k_max) if clamps else t
    p = (u - k_min) * per_spacing
    reached = tl.where(p > 0, p, 0.0)  # of a NaN the first interval; it lives on in p
    j = tl.minimum(reached, last * 1.0).to(tl.int32)
    return c, t, u, p, j


@triton.jit
def _forward(
    z_at, out_at, offset_at, scale_in_at, scale_out_at, count, k_min, k_max, per_spacing,
    last: tl.constexpr, clamps: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = i < count
    z = tl.load(z_at + i, inside, 0.0).to(tl.float32)
    _, _, u, p, j = place(z, tl.load(scale_in_at), k_min, k_max, per_spacing, last, clamps)
    left, right = tl.load(offset_at + j), tl.load(offset_at + j + 1)
    value = u + (left + (p - j.to(tl.float32)) * (right - left))
    tl.store(out_at + i, (tl.load(scale_out_at) * value).to(out_at.dtype.element_ty), inside)


@triton.jit
def add_sums(sums, g, u, p, slope_c, columns, last: tl.constexpr, clamps: tl.constexpr):
    """`sums`, (width,) float64, and on top of it C[0 … last], Σ g, Σ g u and Σ g slope c of a tile."""
    for j in range(last + 1):
        ramp = p - j
        if clamps or j > 0:
            ramp = tl.where(ramp < 0.0, 0.0, ramp)
        if clamps or j < last:
            ramp = tl.where(ramp > 1.0, 1.0, ramp)
        sums += tl.where(columns == j, _total(g * ramp), 0.0)
    sums += tl.where(columns == last + 1, _total(g), 0.0)
    sums += tl.where(columns == last + 2, _total(g * u), 0.0)
    return sums + tl.where(columns == last + 3, _total(g * slope_c), 0.0)


@triton.jit
def _total(x):
    return tl.sum(tl.ravel(x), 0)


@triton.jit
def slope_of(u, t, j, offset_at, per_spacing):
    rise = tl.load(offset_at + j + 1) - tl.load(offset_at + j)
    return tl.where(u == t, 1.0 + rise * per_spacing, 0.0)


@triton.jit
def _backward(
    g_at, z_at, grad_z_at, sums_at, offset_at, scale_in_at, scale_out_at, count, tiles, k_min, k_max, per_spacing,
    last: tl.constexpr, clamps: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Row `program` of sums, (programs, width), as `add_sums` has it."""
    scale_in, scale_out = tl.load(scale_in_at), tl.load(scale_out_at)
    columns = tl.arange(0, width)
    sums = tl.zeros((width,), tl.float64)
    tile = tl.program_id(0)
    while tile < tiles:
        i = tl.full((1,), size, tl.int64) * tile + tl.arange(0, size)
        inside = i < count
        g = tl.load(g_at + i, inside, 0.0).to(tl.float32)
        z = tl.load(z_at + i, inside, 0.0).to(tl.float32)
        c, t, u, p, j = place(z, scale_in, k_min, k_max, per_spacing, last, clamps)
        slope = slope_of(u, t, j, offset_at, per_spacing)
        grad_z = tl.where(c == z, g * slope * (scale_in * scale_out), 0.0)
        tl.store(grad_z_at + i, grad_z.to(grad_z_at.dtype.element_ty), inside)
        sums = add_sums(sums, g, u, p, slope * c, columns, last, clamps)
        tile += tl.num_programs(0)
    tl.store(sums_at + tl.program_id(0) * width + columns, sums)


def why_not(tensor: Tensor, dtype: torch.dtype) -> str | None:
    """Why this backend cannot take a tensor that is computed in `dtype`, or None if it can."""
    if not tensor.is_cuda:
        return f"the tensor is on {tensor.device}"
    if dtype != torch.float32:
        return f"written for float32, not {dtype}"
    return why_hidden()


def forward(
    z: Tensor,
    offsets: Tensor,
    input_scale: Tensor,
    output_scale: Tensor,
    grid: reference.Grid,
) -> Tensor:
    """As `lslora.ops.spline.spline`; computed in float32, returned in the dtype of `z`."""
    z = z.contiguous()
    out = z.new_empty(z.shape)
    if z.numel():
        numbers, settings = arguments(offsets, grid)
        with torch.cuda.device_of(z):
            _forward[(triton.cdiv(z.numel(), TILE),)](
                z, out, offsets.contiguous(), input_scale, output_scale, z.numel(), *numbers, **settings, size=TILE
            )
    return out


def backward(
    grad_output: Tensor,
    z: Tensor,
    offsets: Tensor,
    input_scale: Tensor,
    output_scale: Tensor,
    grid: reference.Grid,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `z` (its dtype), `offsets`, `input_scale` and `output_scale` (float32)."""
    g, z = grad_output.contiguous(), z.contiguous()
    grad_z = z.new_empty(z.shape)
    width = triton.next_power_of_2(len(offsets) + 2)
    tiles = triton.cdiv(z.numel(), TILE)
    programs = max(1, min(tiles, MAX_PROGRAMS))
    sums = z.new_empty(programs, width, dtype=torch.float64)
    numbers, settings = arguments(offsets, grid)
    with torch.cuda.device_of(z):
        _backward[(programs,)](
            g, z, grad_z, sums, offsets.contiguous(), input_scale, output_scale, z.numel(), tiles,
            *numbers, **settings, size=TILE, width=width,
        )  # fmt: skip
    return grad_z, *gradients(sums.sum(0), offsets, output_scale)


def gradients(sums: Tensor, offsets: Tensor, output_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of `offsets`, `input_scale` and `output_scale` (float32), from sums over all elements (`add_sums`)."""
    ramps, g, value, slope_c = sums[: len(offsets) + 2].split([len(offsets) - 1, 1, 1, 1])
    return reference.from_ramps(ramps, g, value, slope_c, offsets, output_scale)


def arguments(offsets: Tensor, grid: reference.Grid) -> tuple[tuple[float, float, float], dict[str, int]]:
    """What kernels want to know of the grid: numbers, and what they are compiled for."""
    per_spacing = 1 / reference.spacing(len(offsets), grid)
    settings = {"last": len(offsets) - 2, "clamps": grid.extrapolation == "clamp"}
    return (grid.k_min, grid.k_max, per_spacing), settings
