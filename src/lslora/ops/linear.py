"""A whole linear layer with its adapter in one operation: the update is added in place, and so is x's gradient."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from . import spline
from .once import once
from .update import backend_for


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
    backend: ModuleType | None = None,
) -> Tensor:
    """`W0 x + b0 + σ · spline(s · B A x / σ)`: `lslora.ops.update.update` of a frozen linear layer's output.

    Instead of five operations one. No tensor of the output's size is made but the output, and the gradient of x is one
    product added to another; saved for the backward pass are x and h = A x. A may be given something else than x, as
    with dropout. Under CUDA's autocast the products are computed in its dtype. Without it A may be in float32 where x
    and W0 are not, and A x is then as well; what is saved is x as it was.

    Args:
        x: (…, in).
        base_weight: W0, (out, in); not differentiated.
        base_bias: b0, (out,), or None; not differentiated.
        a: A, (r, in).
        b: B, (out, r).
        offsets: As for `update`, like what follows.
        dropped: (…, in), what A multiplies; None for x.
        backend: What `backend_for_layer` has found for this layer, if it was asked before.

    Returns:
        (…, out), in the dtype of x or of autocast.

    Raises:
        TypeError: the parameters are no floating-point tensors.
        ValueError: shapes or range are not as above, or `backend_for_layer` names a reason.
    """
    chosen = backend or backend_for_layer(x, base_weight, base_bias, a, b, offsets.numel())
    if isinstance(chosen, str):
        raise ValueError(f"the layer cannot be computed in one operation: {chosen}")
    (out, inner), r = base_weight.shape, a.shape[0]
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
    stretch = stretch if stretch is None else stretch.float()
    arguments = x, dropped, base_weight, base_bias, a, b, *parameters, stretch, settings, chosen
    return _AdaptedLinear.apply(*arguments) if torch.is_grad_enabled() else _forward(*arguments)[0]


def backend_for_layer(
    x: Tensor, base_weight: Tensor, base_bias: Tensor | None, a: Tensor, b: Tensor, num_knots: int
) -> ModuleType | str:
    """What computes a layer of these, or why nothing can; then it takes several operations."""
    if base_weight.requires_grad or (base_bias is not None and base_bias.requires_grad):
        return "the base layer is trained"
    of_base = (x, base_weight) if base_bias is None else (x, base_weight, base_bias)
    dtype = a.dtype  # of A x
    if x.is_cuda:
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
        elif any(tensor.dtype != x.dtype for tensor in of_base) or dtype not in (x.dtype, torch.float32):
            return f"x is {x.dtype} and something that it meets is not"
        for tensor in (*of_base, a):
            if type(tensor) not in (Tensor, nn.Parameter):
                return f"a tensor is a {type(tensor).__name__}"
    return backend_for((*of_base, a, b), dtype, a.shape[0], num_knots)


def _forward(
    x: Tensor,
    dropped: Tensor | None,
    base_weight: Tensor,
    base_bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    scale_in: Tensor | None,
    scale_out: Tensor | None,
    stretch: Tensor | None,
    settings: Any,
    backend: ModuleType,
) -> tuple[Tensor, ...]:
    """The output and h, and what was multiplied: with A, and of weights W0 and A."""
    if torch.is_autocast_enabled(x.device.type):
        # Not left to autocast: it would keep what it casts without a gradient, for others to use.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, base_weight, a = x.to(dtype), base_weight.to(dtype), a.to(dtype)
        dropped = dropped if dropped is None else dropped.to(dtype)
        base_bias = base_bias if base_bias is None else base_bias.to(dtype)
    multiplied = x if dropped is None else dropped
    y, h = linear(x, base_weight, base_bias), linear(multiplied.to(a.dtype), a)
    y = backend.forward(y, h, b, offsets, scale_in, scale_out, stretch, *settings, out=y)
    return y, h, multiplied, base_weight, a


class _AdaptedLinear(torch.autograd.Function):
    """The layer with its gradients written out. Saves h and what A multiplies."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        _, dropped, _, _, _, *rest, ctx.settings, ctx.backend = arguments
        y, h, multiplied, base_weight, a = _forward(*arguments)
        ctx.is_dropped = dropped is not None
        ctx.save_for_backward(multiplied if ctx.needs_input_grad[4] else None, base_weight, a, h, *rest)
        return y.data  # torch's linear may give a view, and of a Function's views none can be changed in place

    @staticmethod
    @once
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        multiplied, base_weight, a, h, *rest = ctx.saved_tensors
        wants_x, wants_dropped, _, _, wants_a, *wants = ctx.needs_input_grad
        grad_h, *found = ctx.backend.backward(grad_output, h, *rest, *ctx.settings)
        r, inner = a.shape
        rows = grad_h.view(-1, r)
        grad_x = grad_dropped = grad_a = None
        if wants_x:
            grad_x = grad_output @ base_weight
            if not ctx.is_dropped:
                flat = grad_x.view(-1, inner)
                if rows.dtype == flat.dtype:
                    flat.addmm_(rows, a)
                else:
                    flat.add_(rows @ a)
        if wants_dropped:
            grad_dropped = grad_h @ a
        if wants_a:
            grad_a = rows.T @ multiplied.reshape(-1, inner).to(rows.dtype)
        gradients = (gradient if needed else None for gradient, needed in zip(found, wants, strict=False))
        return grad_x, grad_dropped, None, None, grad_a, *gradients, None, None, None
