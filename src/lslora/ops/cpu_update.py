"""The whole update on the CPU: `result + σ · spline(s · h Bᵀ / σ)` in one compiled pass, with h Bᵀ in tiles."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import reference
from .cpu import BLOCK, COLUMNS, GROUP, LANES, CompiledSpline, compiled


class _Product(ctypes.Structure):
    """`Product` of cpu.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("h", "weight", "across")),
        *((name, ctypes.c_long) for name in ("n", "m", "r")),
        ("threads", ctypes.c_int),
    )


class Product:
    """`h Bᵀ` as the functions of cpu.c take it, for h (…, r) and B (m, r), float32.

    Holds `h` (n, r) and `weight` (m, r), filled up with zeros as cpu.c wants them, and room for the transposed weight,
    but `forward` takes a few rows (`few`) as they are: the word that is generated would wait for all that.
    """

    def __init__(self, h: Tensor, weight: Tensor, *, few: bool = False) -> None:
        m, r = weight.shape
        self.h, self.weight = _filled(h.reshape(-1, r), 1 if few else GROUP, LANES), _filled(weight, COLUMNS, LANES)
        self.across = None if few else torch.empty_like(self.weight)
        self.threads = torch.get_num_threads()
        across = None if self.across is None else self.across.data_ptr()
        addresses = self.h.data_ptr(), self.weight.data_ptr(), across
        self.structure = _Product(*addresses, h.numel() // r, m, self.h.shape[1], self.threads)
        self.shape = ctypes.byref(self.structure)


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
    """As `lslora.ops.update.update`, all float32; written to `out`, which may be `result` itself, if it is given."""
    if out is None:
        out = torch.empty_like(result, memory_format=torch.contiguous_format)
    base = result.contiguous()
    spline = CompiledSpline(offsets, input_scale_offset, output_scale_offset, grid, scaling, stretch, origin=1.0)
    product = Product(h, weight, few=h.numel() < GROUP * h.shape[-1])
    compiled().update_forward(product.shape, base.data_ptr(), out.data_ptr(), spline.shape)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `h`, `weight`, `offsets`, `input_scale_offset` and `output_scale_offset`, all float32.

    Every thread sums up B's gradient for itself, so this takes that memory as often. What is returned is a copy, as a
    view would hold all of it for as long as there is the gradient.
    """
    spline = CompiledSpline(offsets, input_scale_offset, output_scale_offset, grid, scaling, stretch, origin=1.0)
    product, g = Product(h, weight), grad_output.contiguous()
    grad_h = torch.empty_like(product.h)
    grad_weights = weight.new_zeros(product.threads, *product.weight.shape)
    tiles = -(-product.h.shape[0] // (BLOCK // COLUMNS)) * (product.weight.shape[0] // COLUMNS)
    memory = spline.workspace(tiles, product.threads)
    addresses = (part.data_ptr() for part in memory)
    gradients = grad_h.data_ptr(), grad_weights.data_ptr()
    compiled().update_backward(product.shape, g.data_ptr(), *gradients, spline.shape, *addresses)
    return (
        _part(grad_h, h.reshape(-1, h.shape[-1])).view(h.shape),
        _part(grad_weights[0].clone() if product.threads > 1 else grad_weights[0], weight),
        *spline.gradients(memory[-1]),
    )


def _filled(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix, contiguous, filled up with zeros to multiples of so many rows and columns."""
    more_rows, more_columns = -matrix.shape[0] % rows, -matrix.shape[1] % columns
    return pad(matrix, (0, more_columns, 0, more_rows)) if more_rows or more_columns else matrix.contiguous()


def _part(filled: Tensor, like: Tensor) -> Tensor:
    """What was there before it was filled up."""
    return filled if filled.shape == like.shape else filled[: like.shape[0], : like.shape[1]].contiguous()
