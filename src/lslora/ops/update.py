"""The whole update of a linear layer in one operation, which keeps no tensor of the output's size for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu, reference, spline


def update(
    result: Tensor,
    h: Tensor,
    weight: Tensor,
    offsets: Tensor,
    input_scale: Tensor,
    output_scale: Tensor,
    *,
    scaling: float,
    stretch: float = 1.0,
    k_min: float,
    k_max: float,
    extrapolation: str = "clamp",
) -> Tensor:
    """`result + σ · spline(s · h Bᵀ / σ)`: s the scaling, σ the stretch, `lslora.ops.spline.spline` piecewise.

    `h Bᵀ` is computed in parts that stay in the cache, in the backward pass a second time: saved for it is `h` alone.

    Args:
        result: (…, out), what the update is added to; not changed.
        h: (…, r), the same leading shape.
        weight: B, (out, r).
        offsets: (K,), K ≥ 2; with `input_scale` and `output_scale`, (1,), as in `spline`.
        input_scale: See `offsets`.
        output_scale: See `offsets`.
        scaling: s.
        stretch: σ > 0.
        k_min: Position of the first knot.
        k_max: Position of the last knot, `> k_min`.
        extrapolation: `"clamp"` or `"linear"`.

    Returns:
        Shape and dtype of `result`.

    Raises:
        TypeError: the parameters are no floating-point tensors.
        ValueError: shapes or range are not as above, or `why_not` names a reason.
    """
    if reason := why_not(result, h, weight):
        raise ValueError(f"the update cannot be computed in one operation: {reason}")
    out, r = weight.shape
    if result.shape != (*h.shape[:-1], out) or h.shape[-1] != r:
        raise ValueError(
            f"result, h and weight must have shapes (…, out), (…, r) and (out, r), "
            f"got {tuple(result.shape)}, {tuple(h.shape)} and {tuple(weight.shape)}"
        )
    parameters = spline.checked_parameters(offsets, input_scale, output_scale, torch.float32)
    grid = spline.checked_grid(k_min, k_max, extrapolation)
    flat = _Update.apply(result.reshape(-1, out), h.reshape(-1, r), weight, *parameters, grid, scaling, stretch)
    return flat.view(result.shape)


def why_not(*tensors: Tensor) -> str | None:
    """Why `update` cannot take a result, h and weight, or None if it can."""
    if spline.FORCED not in (None, "cpu"):
        return f"LSLORA_BACKEND is {spline.FORCED}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    return next((reason for tensor in tensors if (reason := cpu.why_not(tensor, tensor.dtype))), None)


class _Update(torch.autograd.Function):
    """The update with its gradients written out."""

    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        h: Tensor,
        weight: Tensor,
        offsets: Tensor,
        input_scale: Tensor,
        output_scale: Tensor,
        grid: reference.Grid,
        scaling: float,
        stretch: float,
    ) -> Tensor:
        ctx.save_for_backward(h, weight, offsets, input_scale, output_scale)
        ctx.settings = grid, scaling, stretch
        return cpu.update_forward(result, h, weight, offsets, input_scale, output_scale, *ctx.settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return grad_output, *cpu.update_backward(grad_output, *ctx.saved_tensors, *ctx.settings), None, None, None
