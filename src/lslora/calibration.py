"""Grids on the scale of what they see: how far the knots of every layer reach is measured early on, then kept.

A fresh adapter's update is zero and grows from layer to layer to very different sizes, so no fixed grid fits. While a
spline is not calibrated it passes its input on unchanged. In the last of `calibration_steps` optimizer steps it counts
how often |z| is of which size; the 99 % quantile becomes the grid's outer end (`MeasuredGrid.grid_scale`), and the
spline begins to learn. Its offsets are zero until then, so the layer's function stays as it is within the grid.
The count of steps is part of the spline's state, so that a training that was interrupted goes on counting.

The change happens between two optimizer steps, never between a forward pass and its repetition under gradient
checkpointing. Counts are summed over micro-batches and processes: data-parallel copies stay equal, and the grid does
not depend on how a batch was split, but for padding: what z is there counts as well, and the split decides how much of
it there is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

if TYPE_CHECKING:
    from .grid import MeasuredGrid

QUANTILE = 0.99
MAX_SAMPLE = 1 << 16  # elements of z that are counted at a time
LOWEST, PER_OCTAVE, BINS = -24, 32, 48 * 32  # |z| from 2⁻²⁴ to 2²⁴ in steps of 2.2 %, interpolated


class Sightings:
    """What a spline has seen since the last optimizer step: counts of |z| by size, (BINS,)."""

    def __init__(self, order: int) -> None:
        self.order = order  # the same in every process, unlike an address
        self.counts: Tensor | None = None
        self.steps: int | None = None  # of the optimizer, `MeasuredGrid.steps_waited`; None until that is read


_waiting: WeakKeyDictionary[MeasuredGrid, Sightings] = WeakKeyDictionary()
_orders = count()


def wait(spline: MeasuredGrid) -> None:
    """From now on `spline` is observed, and calibrated by the optimizer that steps it."""
    _install_hook()
    _waiting[spline] = Sightings(next(_orders))


def is_last_step(spline: MeasuredGrid) -> bool:
    """Whether the optimizer step to come is the one that measures the grid, if there is something to see in it."""
    seen = _waiting[spline]
    if seen.steps is None:
        seen.steps = spline.steps_waited
    return seen.steps + 1 >= spline.calibration_steps


@torch.inference_mode(False)  # the counts are written to in other modes too
@torch.no_grad()
def observe(spline: MeasuredGrid, z: Tensor) -> None:
    """Count z by size; left out is a z that is zero throughout (B = 0: it says nothing) or not finite.

    Nothing here waits for the device.
    """
    flat = z.detach().flatten()
    sample = flat[:: _stride(len(flat))].float().abs()
    counted = (sample.any() & sample.isfinite().all()).long()
    places = ((sample.nan_to_num().log2() - LOWEST) * PER_OCTAVE).clamp(0, BINS - 1).long()
    seen = _waiting[spline]
    if seen.counts is None:
        seen.counts = torch.zeros(BINS, dtype=torch.long, device=z.device)
    seen.counts.scatter_add_(0, places, counted.expand_as(places))


def _stride(count: int) -> int:
    """One in how many of z's `count` elements is looked at.

    A number that shares no factor with `count`, and so with no dimension of z: every feature has its turn.
    """
    stride = max(1, count // MAX_SAMPLE)
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


def advance(optimizer: Optimizer, args: Any = None, kwargs: Any = None) -> None:
    """Count a step of `optimizer` for the waiting splines it holds; not one that a fused optimizer passed over."""
    if not _waiting or _passed_over(optimizer):
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for spline in count_step([s for s in _waiting if s.micro_batches is None and id(s.weight) in held]):
        _forget_steps(optimizer, spline)


def _forget_steps(optimizer: Optimizer, spline: MeasuredGrid) -> None:
    """Let `optimizer` count the spline's steps from now on.

    Until now its gradients were zero. With those steps counted Adam would take its second moment, which is zero, for
    well known, and move a knot by several times the learning rate at first.
    """
    for parameter in spline.parameters():
        state = optimizer.state.get(parameter, {})
        if isinstance(steps := state.get("step"), Tensor):
            steps.zero_()
        elif steps is not None:
            state["step"] = 0


def _passed_over(optimizer: Optimizer) -> bool:
    """Whether gradients were not finite: optimizers that undo the loss scaling themselves are stepped all the same."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


@torch.no_grad()
def count_step(splines: Iterable[MeasuredGrid]) -> list[MeasuredGrid]:
    """Count an optimizer step for those of `splines` that wait and learn; calibrate what has waited long enough.

    The splines of adapters that are not active are frozen, and those on the meta device have no numbers: they go on
    waiting.

    Returns:
        Those that learn from now on.
    """
    due = []
    for spline in sorted(set(splines) & set(_waiting), key=lambda spline: _waiting[spline].order):
        if not spline.waits:  # by a checkpoint loaded since
            del _waiting[spline]
        elif spline.weight.is_meta or not spline.weight.requires_grad:
            _waiting[spline].counts = None
        elif _count(spline) >= spline.calibration_steps:
            due.append(spline)
        else:
            _waiting[spline].counts = None
    calibrated = []
    for spline, quantile in zip(due, _quantiles(due) if due else (), strict=True):
        if quantile > 0:
            spline.calibrate(quantile)
            del _waiting[spline]
            calibrated.append(spline)
        else:
            _waiting[spline].counts = None
    return calibrated


def _count(spline: MeasuredGrid) -> int:
    """The number of optimizer steps that a waiting spline has seen, with this one."""
    seen = _waiting[spline]
    seen.steps = 1 + (spline.steps_waited if seen.steps is None else seen.steps)
    spline.steps_waited = seen.steps
    return seen.steps


def _quantiles(splines: list[MeasuredGrid]) -> Tensor:
    """The quantile of |z| over all processes for every spline, (len(splines),) fp32; zero where nothing was seen."""
    device = splines[0].weight.device
    nothing = torch.zeros(BINS, dtype=torch.long, device=device)
    seen = [_waiting[spline].counts for spline in splines]
    counts = torch.stack([nothing if c is None else c.to(device) for c in seen])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(counts)
    reached = counts.cumsum(1).double()
    wanted = QUANTILE * reached[:, -1:]
    place = torch.searchsorted(reached, wanted).clamp(max=BINS - 1)
    count = counts.gather(1, place)
    share = (wanted - reached.gather(1, place) + count) / count.clamp(min=1)
    quantiles = 2.0 ** ((place + share) / PER_OCTAVE + LOWEST)
    return torch.where(reached[:, -1:] > 0, quantiles, 0.0).squeeze(1).float()


@cache
def _install_hook() -> None:
    register_optimizer_step_post_hook(advance)
