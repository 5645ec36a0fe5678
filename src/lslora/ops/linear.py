"""A whole linear layer with its adapter in one operation: the update is added in place, and so is x's gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from . import cpu, cpu_update, spline


def adapted_linear(
    x: Tensor,
    base_weight: Tensor,
    base_bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    input_scale_offset: Tensor | None,
    output_scale_offset: Tensor | None,
    *,
    stretch: Tensor | None = None,
    scaling: float,
    k_min: float,
    k_max: float,
    extrapolation: str = "clamp",
    dropped: Tensor | None = None,
    asked: bool = False,
) -> Tensor:
    """`W0 x + b0 + σ · spline(s · B A x / σ)`: `lslora.ops.update.update` of a frozen linear layer's output.

    Instead of five operations one, on CPUs and in float32. No tensor of the output's size is made but the output, and
    the gradient of x is one product added to another; saved for the backward pass are x and h = A x.
    A may be given something else than x, as with dropout.

    Args:
        x: (…, in).
        base_weight: W0, (out, in); not differentiated.
        base_bias: b0, (out,), or None; not differentiated.
        a: A, (r, in).
        b: B, (out, r).
        offsets: As for `update`, like what follows.
        dropped: (…, in), what A multiplies; None for x.
        asked: Whether `why_not` was asked before, and had no reason.

    Returns:
        (…, out), float32.

    Raises:
        TypeError: the parameters are no floating-point tensors.
        ValueError: shapes or range are not as above, or `why_not` names a reason.
    """
    if reason := None if asked else why_not(x, base_weight, base_bias, a, b):
        raise ValueError(f"the layer cannot be computed in one operation: {reason}")
    (out, inner), r = base_weight.shape, len(a)
    if x.shape[-1:] != (inner,) or a.shape != (r, inner) or b.shape != (out, r):
        raise ValueError(
            f"x, base_weight, a and b must have shapes (…, in), (out, in), (r, in) and (out, r), "
            f"got {tuple(x.shape)}, {tuple(base_weight.shape)}, {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if dropped is not None and (dropped.shape != x.shape or dropped.dtype != x.dtype):
        raise ValueError(
            f"dropped must be as x, {tuple(x.shape)} {x.dtype}, got {tuple(dropped.shape)} {dropped.dtype}"
        )
    parameters = spline.checked_parameters(offsets, input_scale_offset, output_scale_offset, torch.float32)
    settings = scaling, spline.checked_grid(k_min, k_max, extrapolation)
    arguments = x, dropped, base_weight, base_bias, a, b, *parameters, stretch, settings
    return _AdaptedLinear.apply(*arguments) if torch.is_grad_enabled() else _forward(arguments)[0]


def why_not(x: Tensor, base_weight: Tensor, base_bias: Tensor | None, a: Tensor, b: Tensor) -> str | None:
    """Why a layer of these takes several operations, or None."""
    if base_weight.requires_grad or (base_bias is not None and base_bias.requires_grad):
        return "the base layer is trained"
    if spline.FORCED not in (None, "cpu"):
        return f"LSLORA_BACKEND is {spline.FORCED}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    tensors = (x, base_weight, a, b) if base_bias is None else (x, base_weight, a, b, base_bias)
    return cpu.why_not_all(tensors)


def _forward(arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The output and h, from the arguments of `_AdaptedLinear`."""
    x, dropped, base_weight, base_bias, a, b, offsets, scale_in, scale_out, stretch, (scaling, grid) = arguments
    y, h = linear(x, base_weight, base_bias), linear(x if dropped is None else dropped, a)
    return cpu_update.forward(y, h, b, offsets, scale_in, scale_out, stretch, scaling, grid, out=y), h


class _AdaptedLinear(torch.autograd.Function):
    """The layer with its gradients written out. Saves h and what A multiplies."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, dropped, base_weight, _, a, *rest, ctx.settings = arguments
        y, h = _forward(arguments)
        ctx.is_dropped = dropped is not None
        multiplied = dropped if ctx.is_dropped else x
        ctx.save_for_backward(multiplied if ctx.needs_input_grad[4] else None, base_weight, a, h, *rest)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        multiplied, base_weight, a, h, *rest = ctx.saved_tensors
        wants_x, wants_dropped, _, _, wants_a, wants_b, *wants = ctx.needs_input_grad
        grad_h, grad_b, *found = cpu_update.backward(grad_output, h, *rest, *ctx.settings)
        rows = grad_h.view(-1, len(a))
        grad_x = grad_dropped = grad_a = None
        if wants_x:
            grad_x = grad_output @ base_weight
            if not ctx.is_dropped:
                grad_x.view(-1, a.shape[1]).addmm_(rows, a)
        if wants_dropped:
            grad_dropped = grad_h @ a
        if wants_a:
            grad_a = rows.T @ multiplied.reshape(-1, a.shape[1])
        gradients = (gradient if needed else None for gradient, needed in zip(found, wants, strict=False))
        return grad_x, grad_dropped, None, None, grad_a, grad_b if wants_b else None, *gradients, None, None
