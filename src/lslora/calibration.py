"""Grids on the scale of what they see: how far the knots of every layer reach is measured early on, then kept.

A fresh adapter's update is zero and grows from layer to layer to very different sizes, so no fixed grid fits. While a
spline is not calibrated it passes its input on unchanged and notes the 99 % quantile of |z|. In the last of
`calibration_steps` optimizer steps its mean over micro-batches becomes the grid's outer end (`Spline.grid_scale`), and
the spline begins to learn. Its offsets are zero until then, so the change leaves the layer's function as it is within
the grid.

The change happens between two optimizer steps, never between a forward pass and its repetition under gradient
checkpointing, and with the mean over all processes, so that data-parallel copies stay equal.
"""

from __future__ import annotations

from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

if TYPE_CHECKING:
    from .spline import Spline

QUANTILE = 0.99
MAX_SAMPLE = 1 << 16  # elements of z a quantile is taken over


class Sightings:
    """What a spline has seen so far: quantiles of |z| since the last optimizer step, and the count of steps."""

    def __init__(self, order: int) -> None:
        self.order = order  # the same in every process, unlike an address
        self.quantiles: list[Tensor] = []
        self.steps = 0


_waiting: WeakKeyDictionary[Spline, Sightings] = WeakKeyDictionary()
_orders = count()


def wait(spline: Spline) -> None:
    """From now on `spline` is observed, and calibrated by the optimizer that steps it."""
    _install_hook()
    _waiting[spline] = Sightings(next(_orders))


@torch.no_grad()
def observe(spline: Spline, z: Tensor) -> None:
    """Note the quantile of |z|; a z that is zero throughout (B = 0) says nothing and is left out."""
    flat = z.detach().flatten()
    sample = flat[:: max(1, len(flat) // MAX_SAMPLE)].float().abs()
    if len(sample) and sample.any():
        _waiting[spline].quantiles.append(sample.quantile(QUANTILE))


@torch.no_grad()
def advance(optimizer: Optimizer, args: Any = None, kwargs: Any = None) -> None:
    """Count a step of `optimizer` for the waiting splines it holds; calibrate those that have waited long enough."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    due = []
    for spline in sorted(_waiting, key=lambda spline: _waiting[spline].order):
        if spline.is_calibrated:  # by a checkpoint loaded since
            del _waiting[spline]
        elif id(spline.weight) in held:
            _waiting[spline].steps += 1
            if _waiting[spline].steps >= spline.calibration_steps:
                due.append(spline)
            else:
                _waiting[spline].quantiles.clear()
    if not due:
        return
    for spline, quantile in zip(due, _mean_over_processes(due), strict=True):
        if quantile > 0:  # neither unseen nor NaN
            spline.calibrate(quantile)
            del _waiting[spline]
        else:
            _waiting[spline].quantiles.clear()


def _mean_over_processes(splines: list[Spline]) -> Tensor:
    """Mean quantile of every spline, (len(splines),) fp32; zero where none was seen."""
    device = splines[0].weight.device
    seen = [_waiting[spline].quantiles for spline in splines]
    sums = torch.stack([torch.stack(q).sum().to(device) if q else torch.zeros((), device=device) for q in seen])
    counts = torch.tensor([len(q) for q in seen], dtype=torch.float32, device=device)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(sums)
        distributed.all_reduce(counts)
    return sums / counts.clamp(min=1)


@cache
def _install_hook() -> None:
    register_optimizer_step_post_hook(advance)
