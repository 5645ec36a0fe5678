"""A training that has gone wrong: where a loss or gradient stopped being a number, and splines that look ill."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, distributed, nn

from .diagnostics import trained_records
from .records import UNSTABLE, Record
from .spline import splines_of

REMEDY, OF_SPLINES = "a smaller learning rate", ", or a smaller spline_lr"


def all_finite(loss: Tensor, gradients: Iterable[Tensor]) -> bool:
    """Whether the loss and every element of the gradients are finite; the device is asked once."""
    total = nn.utils.get_total_norm(list(gradients))  # 0 of none
    return bool((loss.isfinite() & total.to(loss.device).isfinite()).item())


def failure(model: nn.Module, inputs: Mapping[str, Any], loss: Tensor, step: int) -> FloatingPointError:
    """What to raise where `all_finite` does not hold: the step, the layer where it begins, its spline's state.

    Of several processes, which hold the model in parts or would wait for one another, only the step is told.

    Args:
        model: As it was when the loss was computed, with its gradients.
        inputs: The batch.
        loss: Of that batch, a scalar.
        step: The optimizer step that is not taken, from 1.
    """
    message = (
        f"step {step}: " + ("a gradient is" if loss.isfinite() else f"the loss is {loss.item()},") + " not finite"
    )
    if not (distributed.is_available() and distributed.is_initialized()):
        layers = _of_gradients(model) if loss.isfinite() else _of_outputs(model, inputs)
        if layers:
            message += f"; it begins in {layers[0]}, one of {len(layers)} layers"
        message += "".join(f"; {_state(r)}" for r in trained_records(model) if r["layer"] in layers[:1])
    remedy = REMEDY + OF_SPLINES * bool(splines_of(model))
    return FloatingPointError(f"{message}. The step was not taken. Start anew with {remedy}")


def unstable_slopes(records: Sequence[Record]) -> str | None:
    """A warning of splines whose slopes explode, with what to do; None without any."""
    unstable = [record for record in records if record["slope_variance"] > UNSTABLE]
    if not unstable:
        return None
    worst = max(unstable, key=lambda record: record["slope_variance"])
    return (
        f"the slopes of {len(unstable)} of {len(records)} splines vary by more than {UNSTABLE:g}, most in "
        f"{worst['layer']} ({worst['slope_variance']:.3g}): take {REMEDY}{OF_SPLINES}"
    )


def endless_waits(model: nn.Module, steps: int) -> str | None:
    """A warning, before a training of so many `steps`, of grids that are measured in its last or later; or None."""
    waiting = [spline for spline in splines_of(model) if spline.weight.requires_grad and spline.waits]
    longest = max((spline.calibration_steps - spline.steps_waited for spline in waiting), default=0)
    if not waiting or longest < steps:
        return None
    return (
        f"{steps} optimizer steps are to come, and grids are measured in the last of {longest} (calibration_steps): "
        "until then splines are the identity, and their layers plain LoRA. Take a third of the steps"
    )


def unmoved_knots(records: Sequence[Record]) -> str | None:
    """A warning of knots that nothing has reached, or that wait for their grid still, and what to do; or None."""
    if waiting := [record["layer"] for record in records if not record["grid_scale"]]:
        return (
            f"{len(waiting)} of {len(records)} splines still wait for their grid, the first in {waiting[0]}: they are "
            "the identity, and their layers plain LoRA. Take fewer calibration_steps, a third of the steps, unless "
            "training was stopped early, or no input reached these layers in train mode"
        )
    unmoved = {record["layer"]: _unmoved(record) for record in records}
    if not any(unmoved.values()):
        return None
    most = max(unmoved, key=unmoved.__getitem__)
    return (
        f"{sum(unmoved.values())} of {sum(len(record['grid']) for record in records)} knots have not moved, most in "
        f"{most} ({unmoved[most]}): no update was large enough to reach them. Take a smaller grid (k_min, k_max), or "
        "have it measured (calibration_steps)"
    )


def _unmoved(record: Record) -> int:
    """Knots at the identity to the last bit: what has a gradient leaves it with the first step."""
    return sum(value == knot for value, knot in zip(record["values"], record["grid"], strict=True))


def _of_outputs(model: nn.Module, inputs: Mapping[str, Any]) -> list[str]:
    """Adapted layers whose output is not finite for this batch, in the order of the forward pass.

    A trainer's batch need not be what its model takes: then what was passed before the model's own error counts, which
    must not stand in the way of the one to tell.
    """
    found: dict[str, None] = {}

    def look(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.setdefault(name)

    hooks = [
        layer.register_forward_hook(lambda _module, _inputs, output, name=name: look(name, output))
        for name, layer in _layers(model).items()
    ]
    try:
        with torch.no_grad(), suppress(Exception):
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found)


def _of_gradients(model: nn.Module) -> list[str]:
    """Adapted layers with a gradient that is not finite, in the order of the backward pass."""
    return [
        name
        for name, layer in reversed(_layers(model).items())
        if any(p.grad is not None and not p.grad.isfinite().all() for p in layer.parameters())
    ]


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    prefix = "base_model.model."
    return {n.removeprefix(prefix): m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def _state(record: Record) -> str:
    heights = ", ".join(f"{value:.3g}" for value in record["values"])
    return (
        f"its spline has the heights {heights}, a slope variance of {record['slope_variance']:.3g}, input_scale "
        f"{record['input_scale']:.3g} and output_scale {record['output_scale']:.3g}"
    )
