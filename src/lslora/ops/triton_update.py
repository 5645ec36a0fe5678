"""The whole update on CUDA: `result + σ · spline(s · h Bᵀ / σ)` in tiles that never leave the chip.

Forward, every program makes one tile of the output. Backward, `h Bᵀ` is computed again. One kernel goes along rows for
the gradient of h and the spline's sums (`lslora.ops.triton`), and for that of B: a product for every tile, added up
over the tiles below one another later. Where r is so large that those products would move more than the gradient
itself, a second kernel goes along columns instead. Each divides its way among several programs, which write to places
of their own, and the last kernel adds these up: no atomics, the same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .launch import launch
from .tracing import why_hidden
from .triton import (
    FUSED,
    MAX_KNOTS,
    add_sums,
    arguments,
    ceil_div,
    finish,
    place,
    power_of_2,
    slope_of,
    store_sums,
    value_of,
)

MAX_R = 256
MAX_R_FLOAT32 = 32  # products in float32 are exact and slow: three of TF32 were up to ten times as far off
PROGRAMS = 1024  # about what fills a GPU
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Tiles(NamedTuple):
    """Sizes of a tile of the output in a kernel, and what it is compiled with."""

    rows: int
    columns: int
    num_warps: int = 4
    maxnreg: int | None = None  # registers of a thread


# The fastest of a dozen on an H100.
FORWARD = Tiles(32, 128)
BACKWARD = Tiles(128, 32, maxnreg=168)
SMALL = Tiles(32, 32)  # above the next
MAX_R_LARGE_TILES = 64
MAX_R_AT_ONCE = 32  # for one backward kernel instead of two
SUM = {"at_once": 16, "size": 256}  # parts and numbers of them that a program of the last kernel adds up


@triton.jit
def _tile(at, i, j, rows, columns):
    """A tile of a contiguous matrix (rows, columns); zero beyond its edges."""
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    return tl.load(at + i.to(tl.int64)[:, None] * columns + j[None, :], inside, 0.0)


@triton.jit
def _store(at, tile, i, j, rows, columns):
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    tl.store(at + i.to(tl.int64)[:, None] * columns + j[None, :], tile.to(at.dtype.element_ty), inside)


@triton.jit
def _scale_at(offset_at):
    """A scale from the address of its offset from 1; 1 without one."""
    if offset_at is None:
        return 1.0
    else:
        return 1.0 + tl.load(offset_at)


@triton.jit
def _stretch(at):
    """The stretch, or 1 where there is none or it is not positive."""
    if at is None:
        return 1.0
    else:
        stretch = tl.load(at)
        return tl.where(stretch > 0, stretch, 1.0)


@triton.jit
def _gradient(
    g, h, b, factor, offset_at, scale_in, scale_out, k_min, k_max, per_spacing,
    last: tl.constexpr, clamps: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of h Bᵀ, and of its place u, p and slope · c."""
    z = tl.dot(h, tl.trans(b), input_precision="ieee") * factor
    c, t, u, p = place(z, scale_in, k_min, k_max, per_spacing, clamps)
    slope = slope_of(u, t, p, offset_at, per_spacing, last, clamps)
    grad_z = g * slope * (scale_in * scale_out * factor)
    if clamps:
        grad_z = tl.where(c == z, grad_z, 0.0)
    return grad_z, u, p, slope * c


@triton.jit(do_not_specialize=("n",))
def _forward(
    result_at, h_at, b_at, out_at, offset_at, scale_in_at, scale_out_at, stretch_at, n, scaling, m, r,
    k_min, k_max, per_spacing, last: tl.constexpr, clamps: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, width_r: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * columns + tl.arange(0, columns)
    i = tl.program_id(1) * rows + tl.arange(0, rows)
    k = tl.arange(0, width_r)
    stretch = _stretch(stretch_at)
    h = _tile(h_at, i, k, n, r)
    b = _tile(b_at, j, k, m, r).to(h.dtype)
    z = tl.dot(h, tl.trans(b), input_precision="ieee") * (scaling / stretch)
    _, _, u, p = place(z, _scale_at(scale_in_at), k_min, k_max, per_spacing, clamps)
    value = value_of(u, p, offset_at, last, clamps)
    base = _tile(result_at, i, j, n, m).to(tl.float32)
    _store(out_at, base + _scale_at(scale_out_at) * stretch * value, i, j, n, m)


@triton.jit(do_not_specialize=("n",))
def _backward_rows(
    g_at, h_at, b_at, grad_h_at, grad_b_at, sums_at, offset_at, scale_in_at, scale_out_at, stretch_at, n,
    scaling, m, r, k_min, k_max, per_spacing, last: tl.constexpr, clamps: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, width_r: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Part `program_id(0)` of the gradient of h, (parts, n, r), and of the sums, (programs, width).

    And part `program_id(1)` of the gradient of B, (programs there, m, r), if it has an address.
    """
    i, k = tl.program_id(1) * rows + tl.arange(0, rows), tl.arange(0, width_r)
    scale_in, stretch = _scale_at(scale_in_at), _stretch(stretch_at)
    scale_out = _scale_at(scale_out_at) * stretch
    h = _tile(h_at, i, k, n, r)
    of_scales: tl.constexpr = scale_in_at is not None or scale_out_at is not None
    count: tl.constexpr = last + 4 if of_scales else last + 2
    grad_h, sums = tl.zeros((rows, width_r), tl.float32), (tl.zeros((rows,), tl.float32),) * count
    for start in range(tl.program_id(0) * columns, m, tl.num_programs(0) * columns):
        j = start + tl.arange(0, columns)
        b = _tile(b_at, j, k, m, r).to(h.dtype)
        g = _tile(g_at, i, j, n, m).to(tl.float32)
        grad_z, u, p, slope_c = _gradient(
            g, h, b, scaling / stretch, offset_at, scale_in, scale_out, k_min, k_max, per_spacing,
            last, clamps,
        )  # fmt: skip
        sums = add_sums(sums, g, u, p, slope_c, last, clamps, of_scales)
        grad_z = grad_z.to(h.dtype)
        grad_h += tl.dot(grad_z, b, input_precision="ieee")
        if grad_b_at is not None:
            grad_b = tl.dot(tl.trans(grad_z), h, input_precision="ieee")
            _store(grad_b_at + tl.program_id(1).to(tl.int64) * m * r, grad_b, j, k, m, r)
    _store(grad_h_at + tl.program_id(0).to(tl.int64) * n * r, grad_h, i, k, n, r)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    store_sums(sums_at + program * width, sums, stretch, count)


@triton.jit(do_not_specialize=("n",))
def _backward_columns(
    g_at, h_at, b_at, grad_b_at, offset_at, scale_in_at, scale_out_at, stretch_at, n, scaling, m, r,
    k_min, k_max, per_spacing, last: tl.constexpr, clamps: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, width_r: tl.constexpr,
):  # fmt: skip
    """Part `program_id(1)` of the gradient of B, (parts, m, r)."""
    j, k = tl.program_id(0) * columns + tl.arange(0, columns), tl.arange(0, width_r)
    scale_in, stretch = _scale_at(scale_in_at), _stretch(stretch_at)
    scale_out = _scale_at(scale_out_at) * stretch
    b = _tile(b_at, j, k, m, r).to(h_at.dtype.element_ty)
    grad_b = tl.zeros((columns, width_r), tl.float32)
    for start in range(tl.program_id(1) * rows, n, tl.num_programs(1) * rows):
        i = start + tl.arange(0, rows)
        h = _tile(h_at, i, k, n, r)
        g = _tile(g_at, i, j, n, m).to(tl.float32)
        grad_z, _, _, _ = _gradient(
            g, h, b, scaling / stretch, offset_at, scale_in, scale_out, k_min, k_max, per_spacing,
            last, clamps,
        )  # fmt: skip
        grad_b += tl.dot(tl.trans(grad_z).to(h.dtype), h, input_precision="ieee")
    _store(grad_b_at + tl.program_id(1).to(tl.int64) * m * r, grad_b, j, k, m, r)


@triton.jit
def _sum_parts(at, parts, count, out_at, program, at_once: tl.constexpr, size: tl.constexpr):
    """Some of Σ over parts of (parts, count)."""
    i = program * size + tl.arange(0, size)
    total = tl.zeros((at_once, size), tl.float32)
    for start in range(0, parts, at_once):
        part = start + tl.arange(0, at_once)
        inside = (part < parts)[:, None] & (i < count)[None, :]
        total += tl.load(at + part.to(tl.int64)[:, None] * count + i[None, :], inside, 0.0)
    tl.store(out_at + i, tl.sum(total, 0).to(out_at.dtype.element_ty), i < count)


@triton.jit(do_not_specialize=("n", "parts_h", "parts_b", "programs"))
def _finish(
    parts_h_at, parts_b_at, sums_at, offset_at, scale_out_at, grad_h_at, grad_b_at, grad_offset_at, grad_scale_in_at,
    grad_scale_out_at, n, parts_h, parts_b, programs, m, r,
    last: tl.constexpr, width: tl.constexpr, at_once: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """The gradients of the spline, of h and of B, from their parts."""
    count_h, count_b = n.to(tl.int64) * r, m * r
    program, of_h = tl.program_id(0) - 1, tl.cdiv(count_h, size)
    if program < 0:
        finish(
            sums_at, programs, offset_at, _scale_at(scale_out_at), grad_offset_at, grad_scale_in_at,
            grad_scale_out_at, last, width,
        )  # fmt: skip
    elif program < of_h:
        _sum_parts(parts_h_at, parts_h, count_h, grad_h_at, program, at_once, size)
    else:
        _sum_parts(parts_b_at, parts_b, count_b, grad_b_at, program - of_h, at_once, size)


def why_not(tensors: Iterable[Tensor], dtype: torch.dtype, r: int, num_knots: int) -> str | None:
    """Why these kernels cannot work on all of these tensors, with an h of this dtype, or None if they can."""
    for tensor in tensors:
        if not tensor.is_cuda:
            return f"a tensor is on {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"written for float32, float16 and bfloat16, not {tensor.dtype}"
    if r > (limit := MAX_R_FLOAT32 if dtype == torch.float32 else MAX_R):
        return f"r must be at most {limit} with an h of {dtype}, got {r}"
    if num_knots > MAX_KNOTS:
        return f"written for at most {MAX_KNOTS} knots, not {num_knots}"
    return why_hidden()


def forward(
    result: Tensor,
    h: Tensor,
    weight: Tensor,
    offsets: Tensor,
    input_scale_offset: Tensor | None,
    output_scale_offset: Tensor | None,
    stretch: Tensor | None,
    scaling: float,
    grid: reference.Grid,
    out: Tensor | None = None,
) -> Tensor:
    """As `lslora.ops.update.update`; written to `out`, which may be `result` itself, if it is given."""
    base, h, weight = result.contiguous(), h.contiguous(), weight.contiguous()
    if out is None:
        out = torch.empty_like(base)
    if base.numel():
        m, r = weight.shape
        n = h.numel() // r
        numbers, settings = arguments(offsets, grid)
        compiled = _compiled(FORWARD, n, r)
        programs = ceil_div(m, compiled["columns"]), ceil_div(n, compiled["rows"]), 1
        factors = input_scale_offset, output_scale_offset, stretch
        tensors = base, h, weight, out, offsets.contiguous(), *factors
        launch(_forward, programs, tensors, (n,), (float(scaling), m, r, *numbers), {**settings, **compiled})
    return out


def backward(
    grad_output: Tensor,
    h: Tensor,
    weight: Tensor,
    offsets: Tensor,
    input_scale_offset: Tensor | None,
    output_scale_offset: Tensor | None,
    stretch: Tensor | None,
    scaling: float,
    grid: reference.Grid,
) -> tuple[Tensor | None, ...]:
    """Gradients of `h` and `weight` (in their dtypes), `offsets` and both scales' offsets (None without them)."""
    g, h, weight, offsets = grad_output.contiguous(), h.contiguous(), weight.contiguous(), offsets.contiguous()
    factors = input_scale_offset, output_scale_offset, stretch
    m, r = weight.shape
    n = h.numel() // r
    numbers, settings = arguments(offsets, grid)
    compiled = _compiled(BACKWARD, n, r)
    # At least one program, so that there are sums even of nothing.
    across, down = max(1, ceil_div(m, compiled["columns"])), max(1, ceil_div(n, compiled["rows"]))
    parts_h, at_once = _parts(across, down), r <= MAX_R_AT_ONCE
    parts_b = down if at_once else _parts(down, across)
    width = power_of_2(offsets.numel() + 2)
    in_parts_h = g.new_empty(parts_h, n, r, dtype=torch.float32)
    in_parts_b = g.new_empty(parts_b, m, r, dtype=torch.float32)
    sums = g.new_empty(down * parts_h, width, dtype=torch.float64)
    found = [None if tensor is None else torch.empty_like(tensor) for tensor in (h, weight, offsets, *factors[:2])]
    spline, constants = (offsets, *factors), (float(scaling), m, r, *numbers)
    in_rows = g, h, weight, in_parts_h, in_parts_b if at_once else None, sums, *spline
    launch(_backward_rows, (parts_h, down, 1), in_rows, (n,), constants, {**settings, **compiled, "width": width})
    if not at_once:
        in_columns = g, h, weight, in_parts_b, *spline
        launch(_backward_columns, (across, parts_b, 1), in_columns, (n,), constants, {**settings, **compiled})
    programs = 1 + ceil_div(n * r, SUM["size"]) + ceil_div(m * r, SUM["size"])
    tensors = in_parts_h, in_parts_b, sums, offsets, output_scale_offset, *found
    counts, compiled = (n, parts_h, parts_b, down * parts_h), {"last": settings["last"], "width": width, **SUM}
    launch(_finish, (programs, 1, 1), tensors, counts, (m, r), compiled)
    return tuple(found)


def _compiled(tiles: Tiles, n: int, r: int) -> dict[str, Any]:
    """What a kernel is compiled for, with tiles for n rows at most."""
    width_r = max(16, power_of_2(r))  # as tensor cores have it
    if width_r > MAX_R_LARGE_TILES:
        tiles = SMALL
    return _settings(tiles, tiles.rows if n >= tiles.rows else max(16, power_of_2(n)), width_r)


@cache
def _settings(tiles: Tiles, rows: int, width_r: int) -> dict[str, Any]:
    settings = {**tiles._asdict(), **FUSED, "rows": rows, "width_r": width_r}
    if tiles.maxnreg is None or torch.version.hip:
        del settings["maxnreg"]
    return settings


def _parts(along: int, across: int) -> int:
    """Among how many programs to divide a way of so many tiles, where there are so many ways."""
    return max(1, min(along, PROGRAMS // across))
