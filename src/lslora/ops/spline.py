"""The spline as a public operation: checks, mixed precision, and a backward pass that costs a few reductions."""

from __future__ import annotations

import os
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import cpu, eager, reference
from .once import once
from .tracing import needs_formula

INTERPOLATION_METHODS = ("piecewise", "soft")
EXTRAPOLATIONS = ("clamp", "linear")
# The kernels do not compile with a Triton before 3.3, which comes with torch 2.7.
HAS_TRITON = find_spec("triton") is not None and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)
BACKENDS = ("triton", "cpu", "eager")  # of the piecewise spline
Scale = TypeVar("Scale", Tensor, Tensor | None)
FORCED = os.environ.get("LSLORA_BACKEND")  # one of them; read once


def spline(
    z: Tensor,
    offsets: Tensor,
    input_scale: Tensor,
    output_scale: Tensor,
    *,
    k_min: float,
    k_max: float,
    interpolation_method: str = "piecewise",
    extrapolation: str = "clamp",
    soft_temperature: float = 0.5,
) -> Tensor:
    """Apply one learnable scalar function to every element: `output_scale · φ(input_scale · clamp(z, k_min, k_max))`.

    `φ` interpolates the heights `v_i = k_i + offset_i` over K evenly spaced knots (README, "Method").

    Args:
        z: Any shape, floating point.
        offsets: (K,), K ≥ 2, floating point: `v_i − k_i`. Zeros make φ the identity.
        input_scale: (1,), floating point.
        output_scale: (1,), floating point.
        k_min: Position of the first knot, in the unit of `z`.
        k_max: Position of the last knot, `> k_min`.
        interpolation_method: `"piecewise"`, straight lines between neighbouring knots, or `"soft"`, softmax weights
            over all knots (memory of K times `z`).
        extrapolation: `"clamp"` holds `z` in [k_min, k_max] and, piecewise, φ at its end knots' values;
            `"linear"` clamps nothing and lets the end segments go on.
        soft_temperature: Width of the soft weights in units of the knot spacing; read by `"soft"` only.

    Returns:
        Shape and dtype of `z`. Computed in float32, or in float64 if `z` is float64. NaN in gives NaN out.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes, range or names are not as above.
    """
    if not z.is_floating_point():
        raise TypeError(f"z must be a floating-point tensor, got {z.dtype}")
    dtype = torch.promote_types(z.dtype, torch.float32)
    parameters = checked_parameters(offsets, input_scale, output_scale, dtype)
    grid = checked_grid(k_min, k_max, extrapolation)
    if interpolation_method not in INTERPOLATION_METHODS:
        raise ValueError(f"interpolation_method must be one of {INTERPOLATION_METHODS}, got {interpolation_method!r}")
    # What follows torch's operations one by one gets them, unless other code was asked for.
    followed = needs_formula() and FORCED in (None, "eager")
    if interpolation_method == "piecewise" and not followed:
        return _Piecewise.apply(z, *parameters, grid)
    y = reference.spline(
        z.to(dtype), *parameters, grid, interpolation_method=interpolation_method, soft_temperature=soft_temperature
    )
    return y.to(z.dtype).reshape(z.shape)  # a number times the scales has one dimension


def checked_parameters(
    offsets: Tensor, input_scale: Scale, output_scale: Scale, dtype: torch.dtype
) -> tuple[Tensor, Scale, Scale]:
    """The three in `dtype`, a scale may be None; TypeError and ValueError as `spline` has them."""
    for name, tensor in (("offsets", offsets), ("input_scale", input_scale), ("output_scale", output_scale)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if offsets.ndim != 1 or offsets.shape[0] < 2:
        raise ValueError(f"offsets must have shape (K,) with K >= 2, got {tuple(offsets.shape)}")
    for scale in (input_scale, output_scale):
        if scale is not None and scale.shape != (1,):
            raise ValueError(f"scales must have shape (1,), got {tuple(scale.shape)}")
    return _in_dtype(offsets, dtype), _in_dtype(input_scale, dtype), _in_dtype(output_scale, dtype)


def _in_dtype(tensor: Scale, dtype: torch.dtype) -> Scale:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def checked_grid(k_min: float, k_max: float, extrapolation: str) -> reference.Grid:
    """The grid; ValueError as `spline` has it."""
    if not k_min < k_max:
        raise ValueError(f"k_min must be smaller than k_max, got {k_min} and {k_max}")
    if extrapolation not in EXTRAPOLATIONS:
        raise ValueError(f"extrapolation must be one of {EXTRAPOLATIONS}, got {extrapolation!r}")
    return reference.Grid(k_min, k_max, extrapolation)


class _Piecewise(torch.autograd.Function):
    """The piecewise spline with its gradients written out. Only `z` is saved, in its own dtype."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, offsets: Tensor, input_scale: Tensor, output_scale: Tensor, grid: reference.Grid
    ) -> Tensor:
        ctx.save_for_backward(z, offsets, input_scale, output_scale)
        ctx.grid = grid
        return _backend(z, offsets).forward(z, offsets, input_scale, output_scale, grid)

    @staticmethod
    @once
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: gradient checkpointing hands them out a single time
        return *_backend(grad_output, saved[1]).backward(grad_output, *saved, ctx.grid), None


def _backend(tensor: Tensor, offsets: Tensor) -> ModuleType:
    """What computes a spline of `tensor`: the fastest backend that can, or the forced one."""
    if FORCED is not None:
        return _forced(tensor, offsets)
    if tensor.is_cuda and HAS_TRITON and not _module("triton").why_not(tensor, offsets):
        return _module("triton")
    return eager if cpu.why_not(tensor, offsets) else cpu


def _forced(tensor: Tensor, offsets: Tensor) -> ModuleType:
    """The backend that `LSLORA_BACKEND` names; ValueError if it cannot run."""
    if FORCED not in BACKENDS:
        raise ValueError(f"LSLORA_BACKEND must be one of {BACKENDS}, got {FORCED!r}")
    if FORCED == "triton" and not HAS_TRITON:
        raise ValueError("LSLORA_BACKEND=triton cannot run here: it needs triton and torch 2.7 or later")
    backend = _module(FORCED)
    if reason := backend.why_not(tensor, offsets):
        raise ValueError(f"LSLORA_BACKEND={FORCED} cannot run here: {reason}")
    return backend


def _module(name: str) -> ModuleType:
    if name == "triton":  # not everywhere, and slow to import
        from . import triton

        return triton
    return {"cpu": cpu, "eager": eager}[name]
