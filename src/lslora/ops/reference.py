"""The mathematics of the spline in plain torch. Every formula stands here once; autograd differentiates all of it.

Notation of the specification: K knots `k_i` evenly spaced by Δk on [k_min, k_max] with heights `v_i = k_i + offset_i`.
With `p = (t − k_min) / Δk`, the position in units of knots, the heights interpolate to

    φ(t) = t + δ(p),    δ(i) = offset_i at the knots

so zero offsets give the identity exactly, whatever the precision.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """Where the first and the last knot lie, and what holds beyond them: `"clamp"` or `"linear"`."""

    k_min: float
    k_max: float
    extrapolation: str = "clamp"


def spline(
    z: Tensor,
    offsets: Tensor,
    input_scale: Tensor,
    output_scale: Tensor,
    grid: Grid,
    *,
    interpolation_method: str,
    soft_temperature: float,
) -> Tensor:
    """`output_scale · φ(input_scale · clamp(z, k_min, k_max))`, without the clamp if `extrapolation="linear"`.

    See `lslora.ops.spline.spline`, the public form, for arguments and shapes; here nothing is checked and everything
    is computed and returned in the dtype of `z`.
    """
    c = clamp(z, grid)
    t = input_scale * c
    if interpolation_method == "soft":
        return output_scale * soft_value(t, offsets, grid, soft_temperature)
    return output_scale * piecewise_value(t, offsets, grid)


def clamp(t: Tensor, grid: Grid) -> Tensor:
    """`t` cut to [k_min, k_max] for `"clamp"`, `t` itself for `"linear"`."""
    return t.clamp(grid.k_min, grid.k_max) if grid.extrapolation == "clamp" else t


def spacing(num_knots: int, grid: Grid) -> float:
    """Δk, the distance between neighbouring knots."""
    return (grid.k_max - grid.k_min) / (num_knots - 1)


def position(t: Tensor, num_knots: int, grid: Grid) -> Tensor:
    """`p = (t − k_min) / Δk`: knot i lies at p = i; beyond the end knots p stops for `"clamp"` and goes on else."""
    return (clamp(t, grid) - grid.k_min) / spacing(num_knots, grid)


def interval(p: Tensor, num_knots: int) -> Tensor:
    """Index (int64, 0 … K−2) of the interval of every position; a knot belongs to the interval on its right."""
    # Clamped once more as integers: the conversion of NaN is undefined, and the NaN itself lives on in p.
    return p.detach().clamp(0, num_knots - 2).long().clamp_(0, num_knots - 2)


def piecewise_value(t: Tensor, offsets: Tensor, grid: Grid) -> Tensor:
    """φ(t) by straight lines between the knots: `δ(p) = (1 − f) · offset_j + f · offset_{j+1}`, f = p − j."""
    p = position(t, len(offsets), grid)
    j = interval(p, len(offsets))
    left, right = offsets.take(j), offsets.take(j + 1)
    return clamp(t, grid) + torch.lerp(left, right, p - j)


def piecewise_slope(t: Tensor, offsets: Tensor, grid: Grid) -> Tensor:
    """φ'(t) = `1 + (offset_{j+1} − offset_j) / Δk`; 0 beyond the end knots for `"clamp"`."""
    j = interval(position(t, len(offsets), grid), len(offsets))
    slope = (1 + offsets.diff() / spacing(len(offsets), grid)).take(j)
    return slope * inside(t, grid)


def inside(t: Tensor, grid: Grid) -> Tensor:
    """The derivative of `clamp`, as a mask that broadcasts: True where `t` passes unchanged."""
    if grid.extrapolation == "linear":
        return torch.ones((), dtype=torch.bool, device=t.device)
    return (t >= grid.k_min) & (t <= grid.k_max)


def knot_weight(p: Tensor, knot: int, num_knots: int) -> Tensor:
    """∂φ/∂offset of one knot, `w_i(p)`: its hat function `max(0, 1 − |p − i|)`, continued along the end segments.

    Exactly zero for every position outside the two intervals beside the knot, so that a knot no element reaches gets
    an exactly zero gradient: Adam would blow rounding noise up to full steps.
    """
    last = num_knots - 1
    if knot == 0:
        weight = (1 - p).clamp(min=0)
    elif knot == last:
        weight = (p - (last - 1)).clamp(min=0)
    else:
        weight = (1 - (p - knot).abs()).clamp(min=0)
    # Only for linear extrapolation are there positions below 0 or above K − 1.
    if knot == 1:
        weight = weight + p.clamp(max=0)
    if knot == last - 1:
        weight = weight - (p - last).clamp(min=0)
    return weight


def soft_value(t: Tensor, offsets: Tensor, grid: Grid, soft_temperature: float) -> Tensor:
    """φ(t) = `t + Σ_i w_i(t) · offset_i` with `w_i = softmax_i(−(t − k_i)² / (2 τ²))`, `τ = soft_temperature · Δk`."""
    num_knots = len(offsets)
    p = position(t, num_knots, grid._replace(extrapolation="linear")).unsqueeze(-1)
    knots = torch.arange(num_knots, dtype=t.dtype, device=t.device)
    weights = torch.softmax(-((p - knots) ** 2) / (2 * soft_temperature**2), dim=-1)
    return t + weights @ offsets
