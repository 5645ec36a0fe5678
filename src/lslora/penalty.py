"""The penalty on the knot heights: `Σ_layers spline_reg_weight · mean_i (v_i − k_i)²`, summed over layers.

Its gradient is added where every training loop passes exactly once per step: right before an optimizer steps. A
penalty added to the model's loss would be dropped by trainers that compute the loss themselves, counted once per
micro-batch under gradient accumulation, and would colour the evaluation loss (FIXES_APPLIED.md, 8). Like decoupled
weight decay it is therefore not subject to gradient clipping, and to loss scaling only where the optimizer undoes it.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet

import torch
from peft.optimizers.lorafa import LoraFAOptimizer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from .spline import Spline

_splines: WeakSet[Spline] = WeakSet()


def track(spline: Spline) -> None:
    """From now on every optimizer that steps this spline's knots adds the gradient of its penalty."""
    _install_hook()
    _splines.add(spline)


def value(spline: Spline) -> Tensor:
    """`spline_reg_weight · mean_i (v_i − k_i)²`, heights in the unit of what the spline is applied to: a scalar."""
    return spline.spline_reg_weight * _in_unit_of_z(spline, spline.offsets).square().mean()


def before_step(optimizer: Optimizer, args: Any = (), kwargs: Any = None) -> tuple[Any, dict[str, Any]] | None:
    """Add the gradients before a step; with a closure, which computes them in the step, whenever it has done so."""
    kwargs = kwargs or {}
    closure = kwargs.get("closure") or next((arg for arg in args[1:] if callable(arg)), None)
    if closure is None:
        add_gradients(optimizer)
        return None

    def penalised() -> Any:
        loss = closure()
        add_gradients(optimizer)
        return loss

    replaced = tuple(penalised if arg is closure else arg for arg in args)
    return replaced, {name: penalised if value is closure else value for name, value in kwargs.items()}


@torch.no_grad()
def add_gradients(optimizer: Optimizer) -> None:
    """Add `2 · spline_reg_weight / K · (v_i − k_i)` to the gradient of every knot that `optimizer` is about to step.

    On a stretched grid (`calibration_steps`) heights are `σ v_i`, so the gradient has a factor of σ². Knots that are
    frozen or have no gradient (not used since the last step) are left alone. Where the optimizer itself is to undo
    the loss scaling (fused ones, `grad_scale`), the gradient is scaled as the others are; where it maximises, it is
    subtracted.

    Raises:
        ValueError: the optimizer is peft's LoRA-FA, which can step no spline.
    """
    signs = {id(p): -1 if group.get("maximize") else 1 for group in optimizer.param_groups for p in group["params"]}
    scale = getattr(optimizer, "grad_scale", None)
    due: dict[tuple[Any, ...], list[Spline]] = {}  # a GPU would take longer to be asked for each than to do it
    for spline in _splines:
        weight = spline.weight
        sign = signs.get(id(weight))
        if isinstance(optimizer, LoraFAOptimizer) and sign:
            raise ValueError("LoRA-FA needs an update linear in B and takes a spline's heights for an A or a B")
        if not spline.spline_reg_weight or spline.micro_batches is not None:
            continue
        if weight.requires_grad and weight.grad is not None and sign:
            kind = spline.num_knots, spline.spline_reg_weight, spline.grid_scale is None
            # Of a spline on the border between two processes FSDP 1 leaves either a part of the knots.
            part = weight.device, weight.dtype, _local(weight).shape
            due.setdefault((sign, *part, *kind), []).append(spline)
    for (sign, *_), alike in due.items():
        gradients = _gradients(alike) * sign
        if scale is not None:
            gradients *= scale.to(gradients.device)
        torch._foreach_add_([_local(spline.weight.grad) for spline in alike], list(gradients))


def pulled_in_backward(spline: Spline) -> Tensor:
    """The offsets, (K,), through which a backward pass adds its micro-batch's share of the penalty's gradient.

    For engines that step parameters of their own making, where `add_gradients` finds none of ours.
    """
    with torch.no_grad():
        share = _gradients([spline])[0] / cast(int, spline.micro_batches)
    return _Pulled.apply(spline.weight, share)


class _Pulled(torch.autograd.Function):
    """`weight`, whose gradient gets `share` on top."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(share)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient + ctx.saved_tensors[0], None


def _gradients(splines: list[Spline]) -> Tensor:
    """Of the penalties of splines alike, with respect to their offsets (or what this process has of them), (…, K)."""
    pulls = torch.stack([_local(spline.weight) for spline in splines])
    scales = [spline.grid_scale for spline in splines if spline.grid_scale is not None]
    if scales:
        pulls = pulls * torch.stack(scales).square()
    return pulls * (2 * splines[0].spline_reg_weight / splines[0].num_knots)


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _in_unit_of_z(spline: Spline, heights: Tensor) -> Tensor:
    """Heights on the spline's grid as heights in the unit of what it is applied to."""
    return heights if spline.grid_scale is None else heights * spline.grid_scale


@cache
def _install_hook() -> None:
    # torch keeps global hooks for good, so one is enough for all splines that ever are.
    register_optimizer_step_pre_hook(before_step)
