"""The spline's grid: where its knots are, and whether it still waits for the scale of what it sees."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import calibration
from .config import LSLoraConfig
from .fp32 import KeepsFp32


class MeasuredGrid(KeepsFp32):
    """Knot positions `σ k_i`, with k_i evenly spaced on [k_min, k_max] and σ measured early in training, or 1.

    σ is `grid_scale`, a buffer (1,) fp32, None without `calibration_steps`. While it is not known, the buffer holds
    −(optimizer steps seen): a training that was interrupted goes on counting.

    A subclass has `weight`, (K,), the heights' deviations from the identity, zero while σ is not known, and
    `micro_batches`, None where an optimizer steps these very parameters.

    Args:
        config: The adapter's settings.
    """

    weight: nn.Parameter
    micro_batches: int | None
    grid_scale: Tensor | None

    def __init__(self, config: LSLoraConfig) -> None:
        super().__init__()
        self.num_knots = config.num_knots
        self.k_min = float(config.k_min)
        self.k_max = float(config.k_max)
        self.calibration_steps = config.calibration_steps
        self.register_buffer("grid_scale", torch.zeros(1, dtype=torch.float32) if config.calibration_steps else None)
        self._calibrated = False
        self._watch()

    def _watch(self) -> None:
        # Where grid_scale stood when it was found to wait, and at the last step's end, when the heights were zero. In
        # training nobody asks again before something is written to it: every answer would hold up the device.
        self._waits_at: tuple[int, int] | None = None
        self._zero_at: tuple[int, int] | None = None
        if self.grid_scale is not None and not self._calibrated:
            calibration.wait(self)

    @property
    def grid(self) -> Tensor:
        """Knot positions before stretching, `k_i`, (K,) fp32."""
        return self.grid_on(self.weight.device)

    def grid_on(self, device: torch.device | str) -> Tensor:
        """The same on another device than the spline's."""
        return torch.linspace(self.k_min, self.k_max, self.num_knots, dtype=torch.float32, device=device)

    @property
    def is_calibrated(self) -> bool:
        """Whether σ has been measured; once it has, no device is asked again before the next load."""
        if not self._calibrated:
            known = self.grid_scale is not None and not self.grid_scale.is_meta
            self._calibrated = known and cast(Tensor, self.grid_scale).item() > 0
        return self._calibrated

    @torch.no_grad()
    def calibrate(self, end: Tensor | float) -> None:
        """Stretch the grid so that its farther end lies at `end` > 0, in the unit of z; the spline learns from now on.

        Raises:
            ValueError: the config asked for no calibration, or `end` is not a positive number.
        """
        if self.grid_scale is None:
            raise ValueError("a spline is calibrated only with calibration_steps > 0")
        if not 0 < float(end) < math.inf:
            raise ValueError(f"the grid's end must be a positive number, got {float(end)}")
        self.grid_scale.fill_(end / max(abs(self.k_min), abs(self.k_max)))
        self._calibrated = True

    @property
    def steps_waited(self) -> int:
        """Optimizer steps that the grid has waited for its scale; 0 once it has it, and without a calibration."""
        return 0 if self.grid_scale is None else max(0, -int(self.grid_scale.item()))

    @steps_waited.setter
    @torch.no_grad()
    def steps_waited(self, steps: int) -> None:
        if self.waits:
            scale = cast(Tensor, self.grid_scale)
            scale.fill_(-steps)
            self._waits_at = self._zero_at = self._standing()

    @property
    def waits(self) -> bool:
        """Whether the grid is still to be measured; until then the spline is the identity."""
        if self.grid_scale is None or self._calibrated:
            return False
        standing = self._standing()
        if standing is not None and standing == self._waits_at:
            return True
        self._waits_at = standing
        return not self.is_calibrated

    def _standing(self) -> tuple[int, int] | None:
        """Which tensor grid_scale is and how often it was written to, in training; None where that cannot be told."""
        scale = cast(Tensor, self.grid_scale)
        return (id(scale), scale._version) if self.training and not scale.is_inference() else None

    def _check_waiting(self) -> None:
        """Raise ValueError if there are heights that need a grid, or this is a copy, which cannot measure one."""
        if (self._zero_at is None or self._zero_at != self._standing()) and self.weight.detach().any():
            raise ValueError(
                "a spline with learned heights must have its grid_scale, a buffer, and that is not positive: who "
                "copies an adapter must copy its state dict, not its parameters alone. TRL's reference adapter is "
                "completed by lslora.training.SplineTrainerMixin; an average of a model (AveragedModel, timm's "
                "ModelEmaV3) must leave the buffers out, use_buffers=False, or begin once the grids are measured"
            )
        if getattr(self, "_is_replica", False):
            raise ValueError(
                "nn.DataParallel works on copies, which cannot measure a grid (calibration_steps): start one process "
                "for each GPU instead, with torchrun or accelerate, or let one GPU be visible"
            )

    def _wants_to_see(self) -> bool:
        """Whether a grid that waits is measured by what the spline is applied to now."""
        return self.training and self.weight.requires_grad and calibration.is_last_step(self)

    def _see(self, z: Tensor) -> None:
        if self._wants_to_see():
            calibration.observe(self, z)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._calibrated = False
        stored = state_dict.get(f"{prefix}grid_scale")
        if self.grid_scale is not None and self.grid_scale.is_meta and stored is not None and not stored.is_meta:
            # Of an offloaded layer, whose parameters accelerate keeps elsewhere, and its buffers nowhere.
            self.grid_scale = stored.detach().to(torch.float32, copy=True)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # What was loaded may wait for its grid. Settled here, since a model that is traced cannot ask the device.
        if not self.is_calibrated:
            self._watch()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch()
