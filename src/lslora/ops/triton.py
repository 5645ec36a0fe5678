"""The piecewise spline on CUDA: one kernel forward, one backward; see `reference` for the mathematics and notation.

Nothing is looked up for an element. Its value and its slope are added up over the knots, `ramp_j(p)` rising from 0 to 1
over interval j and `step_j(p)` at knot j, each a multiply-add that the GPU cuts to [0, 1] at no cost:

    φ = u + offset_0 + Σ_j rise_j ramp_j(p)        φ' = 1 + (rise_0 + Σ_{j≥1} (rise_j − rise_{j−1}) step_j(p)) / Δk

with `rise_j = offset_{j+1} − offset_j`. All gradients of the spline follow from Σ g and one sum an interval,
`C[j] = Σ g ramp_j(p)`: the hat of knot i is `ramp_(i−1) − ramp_i`. Every program adds up its elements and writes its
sums to a place of its own, so there are no atomics, two runs give the same bits, and a knot without elements beside it
gets an exact zero: the same numbers are added up in the same order on both sides of it.
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
PARTS = 64  # programs whose sums are read at a time
FUSED = {"enable_fp_fusion": True}  # multiply-adds; Triton 3.10 leaves them out unless told
MAX_KNOTS = 64  # code is made for each, and `step` is exact for as many


@triton.jit
def clamp(x, low, high):
    high_or_less = tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(high_or_less, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def place(z, scale_in, k_min, k_max, per_spacing, clamps: tl.constexpr):
    """c (the clamped z), t, u (the clamped t) and the position p."""
    c = clamp(z, k_min, k_max) if clamps else z
    t = scale_in * c
    u = clamp(t, k_min, k_max) if clamps else t
    return c, t, u, (u - k_min) * per_spacing


@triton.jit
def ramp(p, j: tl.constexpr, last: tl.constexpr, clamps: tl.constexpr):
    """0 before interval j, 1 after it; the first and the last go on where p does."""
    way = p - j
    if clamps or j > 0:
        way = tl.maximum(way, 0.0)
    if clamps or j < last:
        way = tl.minimum(way, 1.0)
    return way


@triton.jit
def step(p, j: tl.constexpr):
    """1 from knot j on and 0 before it, but for a way of 2⁻¹⁸ intervals: one multiply-add, exact in float32 for j < 64."""
    return tl.minimum(tl.maximum(p * 262144.0 - (j * 262144.0 - 1.0), 0.0), 1.0)


@triton.jit
def rise_of(offset_at, j: tl.constexpr):
    return tl.load(offset_at + j + 1) - tl.load(offset_at + j)


@triton.jit
def value_of(u, p, offset_at, last: tl.constexpr, clamps: tl.constexpr):
    value = u + tl.load(offset_at)
    for j in tl.static_range(last + 1):
        value += rise_of(offset_at, j) * ramp(p, j, last, clamps)
    return value


@triton.jit
def slope_of(u, t, p, offset_at, per_spacing, last: tl.constexpr, clamps: tl.constexpr):
    """φ'(t); 0 where t was clamped."""
    slope = 1.0 + rise_of(offset_at, 0) * per_spacing
    for j in tl.static_range(1, last + 1):
        bend = (rise_of(offset_at, j) - rise_of(offset_at, j - 1)) * per_spacing
        slope += bend * step(p, j)
    return tl.where(u == t, slope, 0.0) if clamps else slope


@triton.jit
def total(x):
    return tl.sum(x)


@triton.jit
def add_sums(sums, g, p, columns, last: tl.constexpr, clamps: tl.constexpr):
    """`sums`, (width,) float64, and on top of it Σ g and C[0 … last] of a tile."""
    sums += tl.where(columns == 0, total(g), 0.0)
    for j in tl.static_range(last + 1):
        sums += tl.where(columns == j + 1, total(g * ramp(p, j, last, clamps)), 0.0)
    return sums


@triton.jit
def add_scale_sums(sums, g, u, slope_c, columns, last: tl.constexpr):
    """The same with Σ g u and Σ g φ'(t) c, which the gradients of the scales need."""
    sums += tl.where(columns == last + 2, total(g * u), 0.0)
    return sums + tl.where(columns == last + 3, total(g * slope_c), 0.0)


@triton.jit
def sum_up(at, programs, columns, width, inside, parts: tl.constexpr):
    """Σ over programs of (programs, width) at some columns, float64; 0 where not inside."""
    sums = tl.zeros(columns.shape, tl.float64)
    for start in range(0, programs, parts):
        program = start + tl.arange(0, parts)
        mask = (program < programs)[:, None] & inside[None, :]
        sums += tl.sum(tl.load(at + program[:, None] * width + columns[None, :], mask, 0.0), 0)
    return sums


@triton.jit
def finish(
    sums_at, programs, offset_at, scale_out, grad_offset_at, grad_scale_in_at, grad_scale_out_at,
    last: tl.constexpr, width: tl.constexpr, parts: tl.constexpr,
):  # fmt: skip
    """The spline's gradients from the sums, (programs, width); see `reference.from_ramps`."""
    i = tl.arange(0, width)
    knots = sum_up(sums_at, programs, i, width, i < last + 2, parts)
    knots -= sum_up(sums_at, programs, i + 1, width, i < last + 1, parts)
    tl.store(grad_offset_at + i, (knots * scale_out).to(tl.float32), i < last + 2)
    if grad_scale_out_at is not None:
        value = sum_up(sums_at, programs, i + 0, width, i == last + 2, parts)
        value += knots * tl.load(offset_at + i, i < last + 2, 0.0)
        tl.store(grad_scale_out_at, tl.sum(value, 0).to(tl.float32))
    if grad_scale_in_at is not None:
        slope_c = sum_up(sums_at, programs, i + 0, width, i == last + 3, parts)
        tl.store(grad_scale_in_at, tl.sum(slope_c * scale_out, 0).to(tl.float32))


@triton.jit
def _forward(
    z_at, out_at, offset_at, scale_in_at, scale_out_at, count, k_min, k_max, per_spacing,
    last: tl.constexpr, clamps: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = i < count
    z = tl.load(z_at + i, inside, 0.0).to(tl.float32)
    _, _, u, p = place(z, tl.load(scale_in_at), k_min, k_max, per_spacing, clamps)
    value = value_of(u, p, offset_at, last, clamps)
    tl.store(out_at + i, (tl.load(scale_out_at) * value).to(out_at.dtype.element_ty), inside)


@triton.jit
def _backward(
    g_at, z_at, grad_z_at, sums_at, offset_at, scale_in_at, scale_out_at, count, tiles, k_min, k_max, per_spacing,
    last: tl.constexpr, clamps: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Row `program` of sums, (programs, width), as `finish` reads it."""
    scale_in, scale_out = tl.load(scale_in_at), tl.load(scale_out_at)
    columns = tl.arange(0, width)
    sums = tl.zeros((width,), tl.float64)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i = tl.full((1,), size, tl.int64) * tile + tl.arange(0, size)
        inside = i < count
        g = tl.load(g_at + i, inside, 0.0).to(tl.float32)
        z = tl.load(z_at + i, inside, 0.0).to(tl.float32)
        c, t, u, p = place(z, scale_in, k_min, k_max, per_spacing, clamps)
        slope = slope_of(u, t, p, offset_at, per_spacing, last, clamps)
        grad_z = g * slope * (scale_in * scale_out)
        if clamps:
            grad_z = tl.where(c == z, grad_z, 0.0)
        tl.store(grad_z_at + i, grad_z.to(grad_z_at.dtype.element_ty), inside)
        sums = add_sums(sums, g, p, columns, last, clamps)
        sums = add_scale_sums(sums, g, u, slope * c, columns, last)
    tl.store(sums_at + tl.program_id(0) * width + columns, sums)


@triton.jit
def _finish(
    sums_at, programs, offset_at, scale_out_at, grad_offset_at, grad_scale_in_at, grad_scale_out_at,
    last: tl.constexpr, width: tl.constexpr, parts: tl.constexpr,
):  # fmt: skip
    scale_out = tl.load(scale_out_at)
    finish(
        sums_at, programs, offset_at, scale_out, grad_offset_at, grad_scale_in_at, grad_scale_out_at,
        last, width, parts,
    )  # fmt: skip


def why_not(tensor: Tensor, offsets: Tensor) -> str | None:
    """Why this backend cannot compute a spline of a tensor, or None if it can."""
    if not tensor.is_cuda:
        return f"the tensor is on {tensor.device}"
    if offsets.dtype != torch.float32:
        return f"written for float32, not {offsets.dtype}"
    if len(offsets) > MAX_KNOTS:
        return f"written for at most {MAX_KNOTS} knots, not {len(offsets)}"
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
                z, out, offsets.contiguous(), input_scale, output_scale, z.numel(), *numbers, **settings, **FUSED, size=TILE
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
    g, z, offsets = grad_output.contiguous(), z.contiguous(), offsets.contiguous()
    grad_z = z.new_empty(z.shape)
    found = tuple(torch.empty_like(parameter) for parameter in (offsets, input_scale, output_scale))
    width = triton.next_power_of_2(len(offsets) + 3)
    tiles = triton.cdiv(z.numel(), TILE)
    programs = max(1, min(tiles, MAX_PROGRAMS))
    sums = z.new_empty(programs, width, dtype=torch.float64)
    numbers, settings = arguments(offsets, grid)
    with torch.cuda.device_of(z):
        _backward[(programs,)](
            g, z, grad_z, sums, offsets, input_scale, output_scale, z.numel(), tiles,
            *numbers, **settings, **FUSED, size=TILE, width=width,
        )  # fmt: skip
        _finish[(1,)](
            sums, programs, offsets, output_scale, *found, last=settings["last"], width=width, parts=PARTS
        )
    return grad_z, *found


def arguments(offsets: Tensor, grid: reference.Grid) -> tuple[tuple[float, float, float], dict[str, int]]:
    """What kernels want to know of the grid: numbers, and what they are compiled for."""
    per_spacing = 1 / reference.spacing(len(offsets), grid)
    settings = {"last": len(offsets) - 2, "clamps": grid.extrapolation == "clamp"}
    return (grid.k_min, grid.k_max, per_spacing), settings
