"""The piecewise spline on CUDA: one kernel forward, one backward; see `reference` for the mathematics and notation.

Nothing is looked up for an element. Its value and its slope are added up over the knots, `ramp_j(p)` rising from 0 to
1 over interval j and `step_j(p)` at knot j, each a multiply-add that the GPU cuts to [0, 1] at no cost:

    φ = u + offset_0 + Σ_j rise_j ramp_j(p)        φ' = 1 + (rise_0 + Σ_{j≥1} (rise_j − rise_{j−1}) step_j(p)) / Δk

with `rise_j = offset_{j+1} − offset_j`. All gradients of the spline follow from one sum an interval,
`C[j] = Σ g ramp_j(p)`, and `Σ g (1 − ramp_0(p))`: the hat of knot i is `ramp_(i−1) − ramp_i`. Every program adds up
its elements and writes its sums to a place of its own, so there are no atomics, two runs give the same bits, and a
knot without elements beside it gets an exact zero: the same numbers are added up in the same order on both sides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .launch import launch
from .tracing import why_hidden

SIDE = 32  # of a square of elements, so many at a time
MAX_PROGRAMS = 1024
SUMS_AT_ONCE = tl.constexpr(4096)
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
    """1 from knot j on and 0 before it, but for a way of 2⁻¹⁸ intervals: a multiply-add, exact for j < 64."""
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
def add_sums(sums, g, u, p, slope_c, last: tl.constexpr, clamps: tl.constexpr, of_scales: tl.constexpr):
    """`sums` and on top of each that of the rows of a tile: Σ g (1 − ramp_0), C[0 … last], Σ g u and Σ g φ'(t) c.

    The last two are for the scales.
    """
    added = (sums[0] + tl.sum(g * (1.0 - ramp(p, 0, last, clamps)), 1),)
    for j in tl.static_range(last + 1):
        added += (sums[j + 1] + tl.sum(g * ramp(p, j, last, clamps), 1),)  # type: ignore[assignment]
    if of_scales:
        added += (sums[last + 2] + tl.sum(g * u, 1), sums[last + 3] + tl.sum(g * slope_c, 1))  # type: ignore[assignment]
    return added


@triton.jit
def store_sums(at, sums, factor, count: tl.constexpr):
    """All rows' sums, float64."""
    for j in tl.static_range(count):
        tl.store(at + j, tl.sum(sums[j].to(tl.float64), 0) * factor)


@triton.jit
def finish(
    sums_at, programs, offset_at, scale_out, grad_offset_at, grad_scale_in_at, grad_scale_out_at,
    last: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """The spline's gradients from the sums, (programs, width); from a ramp for each interval (`cpu.c`)."""
    at_once: tl.constexpr = SUMS_AT_ONCE // width
    i = tl.arange(0, width)
    of_scales = grad_scale_out_at is not None or grad_scale_in_at is not None
    sums, next_sums = tl.zeros((at_once, width), tl.float64), tl.zeros((at_once, width), tl.float64)
    for start in range(0, programs, at_once):
        program = start + tl.arange(0, at_once)
        at, there = sums_at + program[:, None] * width + i[None, :], (program < programs)[:, None]
        sums += tl.load(at, there & (i < (last + 4 if of_scales else last + 2))[None, :], 0.0)
        next_sums += tl.load(at + 1, there & ((i > 0) & (i < last + 1))[None, :], 0.0)
    sums = tl.sum(sums, 0)
    knots = tl.where(i < last + 2, sums - tl.sum(next_sums, 0), 0.0)
    tl.store(grad_offset_at + i, (knots * scale_out).to(tl.float32), i < last + 2)
    if grad_scale_out_at is not None:
        value = tl.where(i == last + 2, sums, knots * tl.load(offset_at + i, i < last + 2, 0.0))
        tl.store(grad_scale_out_at, tl.sum(value, 0).to(tl.float32))
    if grad_scale_in_at is not None:
        slope_c = tl.sum(tl.where(i == last + 3, sums, 0.0), 0)
        tl.store(grad_scale_in_at, (slope_c * scale_out).to(tl.float32))


@triton.jit
def square(tile, side: tl.constexpr):
    """Indices of tile number `tile`, (side, side), int64."""
    i = tl.arange(0, side)
    return tl.full((1, 1), side * side, tl.int64) * tile + i[:, None] * side + i[None, :]


@triton.jit(do_not_specialize=("count",))
def _forward(
    z_at, out_at, offset_at, scale_in_at, scale_out_at, count, k_min, k_max, per_spacing,
    last: tl.constexpr, clamps: tl.constexpr, side: tl.constexpr,
):  # fmt: skip
    i = square(tl.program_id(0), side)
    inside = i < count
    z = tl.load(z_at + i, inside, 0.0).to(tl.float32)
    _, _, u, p = place(z, tl.load(scale_in_at), k_min, k_max, per_spacing, clamps)
    value = value_of(u, p, offset_at, last, clamps)
    tl.store(out_at + i, (tl.load(scale_out_at) * value).to(out_at.dtype.element_ty), inside)


@triton.jit(do_not_specialize=("count", "tiles"))
def _backward(
    g_at, z_at, grad_z_at, sums_at, offset_at, scale_in_at, scale_out_at, count, tiles, k_min, k_max, per_spacing,
    last: tl.constexpr, clamps: tl.constexpr, side: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Row `program` of sums, (programs, width), as `finish` reads it."""
    scale_in, scale_out = tl.load(scale_in_at), tl.load(scale_out_at)
    sums = (tl.zeros((side,), tl.float32),) * (last + 4)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i = square(tile, side)
        inside = i < count
        g = tl.load(g_at + i, inside, 0.0).to(tl.float32)
        z = tl.load(z_at + i, inside, 0.0).to(tl.float32)
        c, t, u, p = place(z, scale_in, k_min, k_max, per_spacing, clamps)
        slope = slope_of(u, t, p, offset_at, per_spacing, last, clamps)
        grad_z = g * slope * (scale_in * scale_out)
        if clamps:
            grad_z = tl.where(c == z, grad_z, 0.0)
        tl.store(grad_z_at + i, grad_z.to(grad_z_at.dtype.element_ty), inside)
        sums = add_sums(sums, g, u, p, slope * c, last, clamps, True)
    store_sums(sums_at + tl.program_id(0) * width, sums, 1.0, last + 4)


@triton.jit(do_not_specialize=("programs",))
def _finish(
    sums_at, offset_at, scale_out_at, grad_offset_at, grad_scale_in_at, grad_scale_out_at, programs,
    last: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    finish(
        sums_at, programs, offset_at, tl.load(scale_out_at), grad_offset_at, grad_scale_in_at, grad_scale_out_at,
        last, width,
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
        tensors = z, out, offsets.contiguous(), input_scale, output_scale
        programs = ceil_div(z.numel(), SIDE * SIDE), 1, 1
        launch(_forward, programs, tensors, (z.numel(),), numbers, {**settings, **FUSED, "side": SIDE})
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
    found = torch.empty_like(offsets), torch.empty_like(input_scale), torch.empty_like(output_scale)
    width = power_of_2(offsets.numel() + 2)
    tiles = ceil_div(z.numel(), SIDE * SIDE)
    programs = max(1, min(tiles, MAX_PROGRAMS))
    sums = z.new_empty(programs, width, dtype=torch.float64)
    numbers, settings = arguments(offsets, grid)
    tensors = g, z, grad_z, sums, offsets, input_scale, output_scale
    compiled = {**settings, **FUSED, "side": SIDE, "width": width}
    launch(_backward, (programs, 1, 1), tensors, (z.numel(), tiles), numbers, compiled)
    compiled = {"last": settings["last"], "width": width}
    launch(_finish, (1, 1, 1), (sums, offsets, output_scale, *found), (programs,), (), compiled)
    return grad_z, *found


# Triton's own take microseconds a call.
def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(count: int) -> int:
    """The smallest that is not less."""
    return 1 << (count - 1).bit_length()


def arguments(offsets: Tensor, grid: reference.Grid) -> tuple[tuple[float, float, float], dict[str, int]]:
    """What kernels want to know of the grid: numbers, and what they are compiled for."""
    per_spacing = 1 / reference.spacing(offsets.numel(), grid)
    settings = {"last": offsets.numel() - 2, "clamps": grid.extrapolation == "clamp"}
    return (float(grid.k_min), float(grid.k_max), per_spacing), settings
