"""The whole update on CUDA: `result + σ · spline(s · h Bᵀ / σ)` in tiles that never leave the chip.

Forward, every program makes one tile of the output. Backward, `h Bᵀ` is computed again: one kernel goes along rows for
the gradient of h and the spline's sums (`lslora.ops.triton`), one along columns for that of B. Each divides its way
among several programs, which write to places of their own, added up at the end: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .tracing import why_hidden
from .triton import add_sums, arguments, gradients, place, slope_of

MAX_R = 256
PROGRAMS = 1024  # about what fills a GPU
HALF = (torch.float16, torch.bfloat16)


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
def _stretch(at):
    """The stretch, or 1 where it is not positive."""
    stretch = tl.load(at)
    return tl.where(stretch > 0, stretch, 1.0)


@triton.jit
def _gradient(
    g, h, b, factor, offset_at, scale_in, scale_out, k_min, k_max, per_spacing,
    last: tl.constexpr, clamps: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of h Bᵀ, and of its place u, p and slope · c."""
    z = tl.dot(h, tl.trans(b), input_precision="ieee") * factor
    c, t, u, p, j = place(z, scale_in, k_min, k_max, per_spacing, last, clamps)
    slope = slope_of(u, t, j, offset_at, per_spacing)
    return tl.where(c == z, g * slope * (scale_in * scale_out * factor), 0.0), u, p, slope * c


@triton.jit
def _forward(
    result_at, h_at, b_at, out_at, offset_at, scale_in_at, scale_out_at, stretch_at, scaling, n, m, r,
    k_min, k_max, per_spacing, last: tl.constexpr, clamps: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, width_r: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * rows + tl.arange(0, rows)
    j = tl.program_id(1) * columns + tl.arange(0, columns)
    k = tl.arange(0, width_r)
    stretch = _stretch(stretch_at)
    z = tl.dot(_tile(h_at, i, k, n, r), tl.trans(_tile(b_at, j, k, m, r)), input_precision="ieee")
    _, _, u, p, at = place(z * (scaling / stretch), tl.load(scale_in_at), k_min, k_max, per_spacing, last, clamps)
    left, right = tl.load(offset_at + at), tl.load(offset_at + at + 1)
    value = u + (left + (p - at.to(tl.float32)) * (right - left))
    base = _tile(result_at, i, j, n, m).to(tl.float32)
    _store(out_at, base + tl.load(scale_out_at) * stretch * value, i, j, n, m)


@triton.jit
def _backward_rows(
    g_at, h_at, b_at, grad_h_at, sums_at, offset_at, scale_in_at, scale_out_at, stretch_at, scaling, n, m, r,
    k_min, k_max, per_spacing, last: tl.constexpr, clamps: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, width_r: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Part `program_id(1)` of the gradient of h, (parts, n, r), and of the sums, (programs, width)."""
    i, k = tl.program_id(0) * rows + tl.arange(0, rows), tl.arange(0, width_r)
    scale_in, stretch = tl.load(scale_in_at), _stretch(stretch_at)
    scale_out = tl.load(scale_out_at) * stretch
    h = _tile(h_at, i, k, n, r)
    grad_h, sums = tl.zeros((rows, width_r), tl.float32), tl.zeros((width,), tl.float64)
    start = tl.program_id(1) * columns
    while start < m:
        j = start + tl.arange(0, columns)
        b = _tile(b_at, j, k, m, r)
        g = _tile(g_at, i, j, n, m).to(tl.float32)
        grad_z, u, p, slope_c = _gradient(
            g, h, b, scaling / stretch, offset_at, scale_in, scale_out, k_min, k_max, per_spacing, last, clamps
        )
        grad_h += tl.dot(grad_z.to(b.dtype), b, input_precision="ieee")
        sums = add_sums(sums, g, u, p, slope_c, tl.arange(0, width), last, clamps)
        start += tl.num_programs(1) * columns
    _store(grad_h_at + tl.program_id(1).to(tl.int64) * n * r, grad_h, i, k, n, r)
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums_at + program * width + tl.arange(0, width), sums * stretch)


@triton.jit
def _backward_columns(
    g_at, h_at, b_at, grad_b_at, offset_at, scale_in_at, scale_out_at, stretch_at, scaling, n, m, r,
    k_min, k_max, per_spacing, last: tl.constexpr, clamps: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, width_r: tl.constexpr,
):  # fmt: skip
    """Part `program_id(1)` of the gradient of B, (parts, m, r)."""
    j, k = tl.program_id(0) * columns + tl.arange(0, columns), tl.arange(0, width_r)
    scale_in, stretch = tl.load(scale_in_at), _stretch(stretch_at)
    scale_out = tl.load(scale_out_at) * stretch
    b = _tile(b_at, j, k, m, r)
    grad_b = tl.zeros((columns, width_r), tl.float32)
    start = tl.program_id(1) * rows
    while start < n:
        i = start + tl.arange(0, rows)
        h = _tile(h_at, i, k, n, r)
        g = _tile(g_at, i, j, n, m).to(tl.float32)
        grad_z, _, _, _ = _gradient(
            g, h, b, scaling / stretch, offset_at, scale_in, scale_out, k_min, k_max, per_spacing, last, clamps
        )
        grad_b += tl.dot(tl.trans(grad_z).to(h.dtype), h, input_precision="ieee")
        start += tl.num_programs(1) * rows
    _store(grad_b_at + tl.program_id(1).to(tl.int64) * m * r, grad_b, j, k, m, r)


def why_not(result: Tensor, h: Tensor, weight: Tensor) -> str | None:
    """Why these kernels cannot take a result, h and weight, or None if they can."""
    for tensor in (result, h, weight):
        if not tensor.is_cuda:
            return f"a tensor is on {tensor.device}"
        if tensor.dtype not in (torch.float32, *HALF):
            return f"written for float32, float16 and bfloat16, not {tensor.dtype}"
    if h.shape[-1] > MAX_R:
        return f"r must be at most {MAX_R}, got {h.shape[-1]}"
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
) -> Tensor:
    """As `lslora.ops.update.update`, with `weight` in the dtype of `h`."""
    base, h, weight = _rows(result), _rows(h), weight.contiguous()
    out = torch.empty_like(base)
    factors = _factors(offsets, input_scale_offset, output_scale_offset, stretch)
    (n, m), tiles = base.shape, _tiles(h)
    if base.numel():
        numbers, settings = arguments(offsets, grid)
        programs = (triton.cdiv(n, tiles["rows"]), triton.cdiv(m, tiles["columns"]))
        with torch.cuda.device_of(base):
            _forward[programs](
                base, h, weight, out, offsets.contiguous(), *factors, scaling,
                n, m, h.shape[1], *numbers, **settings, **tiles,
            )  # fmt: skip
    return out.view(result.shape)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `h` and `weight` (their dtype), `offsets` and both scales' offsets (float32)."""
    shape, g, h, weight = h.shape, _rows(grad_output), _rows(h), weight.contiguous()
    factors = _factors(offsets, input_scale_offset, output_scale_offset, stretch)
    (n, m), r, tiles = g.shape, h.shape[1], _tiles(h)
    # At least one program, so that there are sums even of nothing.
    across, down = max(1, triton.cdiv(n, tiles["rows"])), max(1, triton.cdiv(m, tiles["columns"]))
    parts_h, parts_b = (max(1, min(b, PROGRAMS // a)) for a, b in ((across, down), (down, across)))
    width = triton.next_power_of_2(len(offsets) + 2)
    grad_h = g.new_empty(parts_h, n, r, dtype=torch.float32)
    grad_weight = g.new_empty(parts_b, m, r, dtype=torch.float32)
    sums = g.new_empty(across * parts_h, width, dtype=torch.float64)
    numbers, settings = arguments(offsets, grid)
    spline = (offsets.contiguous(), *factors, scaling, n, m, r, *numbers)
    with torch.cuda.device_of(g):
        _backward_rows[(across, parts_h)](g, h, weight, grad_h, sums, *spline, **settings, **tiles, width=width)
        _backward_columns[(down, parts_b)](g, h, weight, grad_weight, *spline, **settings, **tiles)
    found = gradients(sums.sum(0), offsets, factors[1])
    return grad_h.sum(0).to(h.dtype).view(shape), grad_weight.sum(0).to(weight.dtype), *found


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def _factors(
    offsets: Tensor, input_scale_offset: Tensor | None, output_scale_offset: Tensor | None, stretch: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Both scales and the stretch as tensors, (1,) each."""
    one = offsets.new_ones(1)
    return (
        one if input_scale_offset is None else 1 + input_scale_offset,
        one if output_scale_offset is None else 1 + output_scale_offset,
        one if stretch is None else stretch,
    )


def _tiles(h: Tensor) -> dict[str, int]:
    """Sizes of a tile: of the output, and the power of two that r fits in (16 at least, for tensor cores)."""
    width_r = max(16, triton.next_power_of_2(h.shape[1]))
    size = 64 if width_r <= 64 else 32
    return {"rows": size, "columns": size, "width_r": width_r}
