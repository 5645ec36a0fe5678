"""The whole update of a linear layer in one operation, which keeps no tensor of the output's size for backward."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import cpu, cpu_update, spline
from .once import once


def update(
    result: Tensor,
    h: Tensor,
    weight: Tensor,
    offsets: Tensor,
    input_scale_offset: Tensor | None,
    output_scale_offset: Tensor | None,
    *,
    stretch: Tensor | None = None,
    scaling: float,
    k_min: float,
    k_max: float,
    extrapolation: str = "clamp",
    backend: ModuleType | None = None,
) -> Tensor:
    """`result + σ · spline(s · h Bᵀ / σ)`: s the scaling, σ the stretch, `lslora.ops.spline.spline` piecewise.

    `h Bᵀ` is computed in parts that stay in the cache, in the backward pass a second time: saved for it is `h` alone.

    Args:
        result: (…, out), what the update is added to; not changed.
        h: (…, r), the same leading shape.
        weight: B, (out, r).
        offsets: (K,), K ≥ 2, as in `spline`.
        input_scale_offset: `input_scale − 1`, (1,); None where the scale is 1 and not learned.
        output_scale_offset: The same of `output_scale`.
        stretch: σ, (1,); not differentiated. None for 1, and so is what is not positive.
        scaling: s.
        k_min: Position of the first knot.
        k_max: Position of the last knot, `> k_min`.
        extrapolation: `"clamp"` or `"linear"`.
        backend: What `backend_for` has found for `result`, `h` and `weight`, if it was asked before.

    Returns:
        Shape and dtype of `result`.

    Raises:
        TypeError: the parameters are no floating-point tensors.
        ValueError: shapes or range are not as above, or `backend_for` names a reason.
    """
    chosen = backend or backend_for((result, h, weight), h.dtype, h.shape[-1], offsets.numel())
    if isinstance(chosen, str):
        raise ValueError(f"the update cannot be computed in one operation: {chosen}")
    out, r = weight.shape
    if result.shape != (*h.shape[:-1], out) or h.shape[-1] != r:
        raise ValueError(
            f"result, h and weight must have shapes (…, out), (…, r) and (out, r), "
            f"got {tuple(result.shape)}, {tuple(h.shape)} and {tuple(weight.shape)}"
        )
    parameters = spline.checked_parameters(offsets, input_scale_offset, output_scale_offset, torch.float32)
    settings = scaling, spline.checked_grid(k_min, k_max, extrapolation)
    stretch = stretch if stretch is None else stretch.float()
    if not torch.is_grad_enabled():
        return chosen.forward(result, h, weight, *parameters, stretch, *settings)
    return _Update.apply(result, h, weight, *parameters, stretch, settings, chosen)


def backend_for(tensors: tuple[Tensor, ...], dtype: torch.dtype, r: int, num_knots: int) -> ModuleType | str:
    """What computes an update of all of these, h in `dtype`, or why nothing can; then it takes several operations."""
    name = "triton" if tensors[0].is_cuda and spline.HAS_TRITON else "cpu"
    if spline.FORCED not in (None, name):
        return f"LSLORA_BACKEND is {spline.FORCED}"
    if name == "triton":  # not everywhere, and slow to import
        from . import triton_update

        return triton_update.why_not(tensors, dtype, r, num_knots) or triton_update
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    return cpu.why_not_all(tensors) or cpu_update


class _Update(torch.autograd.Function):
    """The update with its gradients written out. Saved are h, in its own dtype, and the parameters."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, h: Tensor, *arguments: Any) -> Tensor:
        *tensors, ctx.settings, ctx.backend = arguments
        ctx.save_for_backward(h, *tensors)
        return ctx.backend.forward(result, h, *tensors, *ctx.settings)

    @staticmethod
    @once
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.backend.backward(grad_output, *ctx.saved_tensors, *ctx.settings)
        wanted = zip(found, ctx.needs_input_grad[1:], strict=False)
        gradients = (gradient if needed else None for gradient, needed in wanted)
        return grad_output, *gradients, None, None, None
