"""The spline's module: its parameters, how they are stored, and by which operation it is computed."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import calibration, penalty
from .config import LSLoraConfig
from .fp32 import KeepsFp32
from .ops.linear import adapted_linear, backend_for_layer
from .ops.spline import spline
from .ops.update import backend_for, update


class Spline(KeepsFp32):
    """`output_scale · φ(input_scale · clamp(z, k_min, k_max))`, elementwise, φ learnable, at first `φ(t) = t`.

    Stored and trained are the deviations from the identity: zeros at the start, in fp32 always.

    | stored as | shape | meaning |
    |---|---|---|
    | `weight` | (K,) | `values − grid` |
    | `input_scale_offset` | (1,) | `input_scale − 1` |
    | `output_scale_offset` | (1,) | `output_scale − 1` |
    | `grid_scale`, a buffer | (1,) | σ of `calibration_steps`; before, −(optimizer steps seen); None without |

    The two scales are None with `learn_scales=False`.
    With `calibration_steps` the whole function is stretched: `σ · spline(z / σ)`, with σ such that the grid's farther
    end lies at the 99 % quantile of |z|. Until σ is known the spline is the identity and does not learn.

    Args:
        config: The adapter's settings; the fields of the spline are read.
    """

    def __init__(self, config: LSLoraConfig) -> None:
        super().__init__()
        self.grid_scale: Tensor | None
        self.num_knots = config.num_knots
        self.k_min = float(config.k_min)
        self.k_max = float(config.k_max)
        self.interpolation_method = config.interpolation_method
        self.extrapolation = config.extrapolation
        self.soft_temperature = float(config.soft_temperature)
        self.spline_reg_weight = float(config.spline_reg_weight)
        # FSDP's wrapping policy for peft looks for trainable leaves by the name `weight`.
        self.weight = nn.Parameter(_zeros(config.num_knots))
        self.input_scale_offset = nn.Parameter(_zeros(1)) if config.learn_scales else None
        self.output_scale_offset = nn.Parameter(_zeros(1)) if config.learn_scales else None
        self.calibration_steps = config.calibration_steps
        self.register_buffer("grid_scale", _zeros(1) if config.calibration_steps else None)
        self._calibrated = False
        # Where no optimizer steps these very parameters (`lslora.training.prepare_for_deepspeed`): the backward passes
        # in a step, which share the penalty's gradient. Otherwise None.
        self.micro_batches: int | None = None
        self._track()

    def _track(self) -> None:
        # Where grid_scale stood when it was found to wait, and at the last step's end, when the heights were zero. In
        # training nobody asks again before something is written to it: every answer would hold up the device.
        self._waits_at: int | None = None
        self._zero_at: int | None = None
        penalty.track(self)
        if self.grid_scale is not None and not self._calibrated:
            calibration.wait(self)

    @property
    def grid(self) -> Tensor:
        """Knot positions `k_i`, (K,) fp32: evenly spaced on [k_min, k_max]."""
        return torch.linspace(self.k_min, self.k_max, self.num_knots, dtype=torch.float32, device=self.weight.device)

    @property
    def offsets(self) -> Tensor:
        """Deviations from the identity, `v_i − k_i`, (K,) fp32."""
        return _whole(self.weight)

    @property
    def values(self) -> Tensor:
        """Knot heights `v_i`, (K,) fp32."""
        return self.grid + self.offsets

    @values.setter
    def values(self, values: Tensor | list[float]) -> None:
        _assign(self.weight, "values", values, self.grid)

    @property
    def input_scale(self) -> Tensor:
        """Factor on φ's argument, (1,) fp32."""
        return _scale(self.input_scale_offset, self.weight)

    @input_scale.setter
    def input_scale(self, scale: Tensor | float) -> None:
        _assign(self.input_scale_offset, "input_scale", scale, 1)

    @property
    def output_scale(self) -> Tensor:
        """Factor on φ's value, (1,) fp32."""
        return _scale(self.output_scale_offset, self.weight)

    @output_scale.setter
    def output_scale(self, scale: Tensor | float) -> None:
        _assign(self.output_scale_offset, "output_scale", scale, 1)

    @property
    def is_calibrated(self) -> bool:
        """Whether `grid_scale` is known; once it is, no device is asked again before the next load."""
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

    def _standing(self) -> int | None:
        """How often something was written to grid_scale, in training; None where that cannot be told."""
        scale = cast(Tensor, self.grid_scale)
        return scale._version if self.training and not scale.is_inference() else None

    def forward(self, z: Tensor) -> Tensor:
        """Shape and dtype of `z`, any shape; see `lslora.ops.spline.spline`."""
        self._check_engine()
        if self.grid_scale is None:
            return self._spline(z)
        if self.waits:
            if (self._zero_at is None or self._zero_at != self._standing()) and self.weight.detach().any():
                raise ValueError(
                    "a spline with learned heights must have its grid_scale, a buffer, and that is not positive: "
                    "who copies an adapter must copy its state dict, not its parameters alone. TRL's reference "
                    "adapter is completed by lslora.training.SplineTrainerMixin; AveragedModel needs use_buffers=False"
                )
            if getattr(self, "_is_replica", False):
                raise ValueError(
                    "nn.DataParallel works on copies, which cannot measure a grid (calibration_steps): start one "
                    "process for each GPU instead, with torchrun or accelerate, or let one GPU be visible"
                )
            if self.training and self.weight.requires_grad:
                calibration.observe(self, z)
            # Every parameter takes part, as data parallelism wants it.
            nothing = 0 * torch.cat(list(self.parameters())).sum()
            return z + nothing.to(z.dtype)
        # Zero where a hot swap has put an adapter whose grid still waits; its offsets are zero as well.
        stretch = torch.where(self.grid_scale > 0, self.grid_scale, 1.0)
        return (self._spline(z / stretch) * stretch).to(z.dtype)

    def update(self, result: Tensor, h: Tensor, weight: Tensor, scaling: float) -> Tensor | None:
        """`result + self(scaling · h weightᵀ)` in one operation; None where it takes several now.

        See `lslora.ops.update.update`.
        """
        self._check_engine()
        if self.interpolation_method != "piecewise" or self.waits:
            return None
        backend = backend_for((result, h, weight), h.dtype, h.shape[-1], self.num_knots)
        if isinstance(backend, str):
            return None
        return update(result, h, weight, *self._tensors(), scaling=scaling, backend=backend, **self._settings())

    def adapted_linear(
        self, x: Tensor, base: nn.Linear, dropout: nn.Module, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor | None:
        """`base(x) + self(scaling · b a dropout(x))` in one operation; None where it takes several now.

        See `lslora.ops.linear.adapted_linear`.
        """
        self._check_engine()
        if self.interpolation_method != "piecewise" or self.waits:
            return None
        layer = x, base.weight, base.bias, a, b
        backend = backend_for_layer(*layer, self.num_knots)
        if isinstance(backend, str):
            return None
        dropped = dropout(x)
        settings = {"scaling": scaling, "dropped": None if dropped is x else dropped, **self._settings()}
        return adapted_linear(*layer, *self._tensors(), backend=backend, **settings)

    def _tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The offsets, of the knots and of the scales, as a forward pass uses them."""
        return self._offsets(), self.input_scale_offset, self.output_scale_offset

    def _settings(self) -> dict[str, Any]:
        return {
            "stretch": self.grid_scale,
            "k_min": self.k_min,
            "k_max": self.k_max,
            "extrapolation": self.extrapolation,
        }

    def _check_engine(self) -> None:
        """Raise ValueError if the penalty and the calibration would be lost: DeepSpeed leaves its marks on weights."""
        if self.micro_batches is not None or not (
            hasattr(self.weight, "ds_id") or hasattr(self.weight, "_hp_mapping")
        ):
            return
        if self.training and self.weight.requires_grad and (self.waits or self.spline_reg_weight):
            raise ValueError(
                "DeepSpeed's optimizers pass by the penalty and the calibration: before deepspeed.initialize, call "
                "lslora.training.prepare_for_deepspeed, or train with lslora.training.SplineTrainerMixin"
            )

    def _offsets(self) -> Tensor:
        """The offsets as a forward pass uses them."""
        penalised = self.micro_batches is not None and self.spline_reg_weight
        return penalty.pulled_in_backward(self) if penalised else self.weight

    def _spline(self, z: Tensor) -> Tensor:
        return spline(
            z,
            self._offsets(),
            self.input_scale,
            self.output_scale,
            k_min=self.k_min,
            k_max=self.k_max,
            interpolation_method=self.interpolation_method,
            extrapolation=self.extrapolation,
            soft_temperature=self.soft_temperature,
        )

    def extra_repr(self) -> str:
        return (
            f"num_knots={self.num_knots}, k_min={self.k_min}, k_max={self.k_max}, "
            f"interpolation_method={self.interpolation_method!r}, extrapolation={self.extrapolation!r}"
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._calibrated = False
        super()._load_from_state_dict(*args, **kwargs)
        self._track()  # what was loaded may not be calibrated yet

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._track()


def splines_of(model: nn.Module) -> list[Spline]:
    """All splines of `model`, in its order."""
    return [module for module in model.modules() if isinstance(module, Spline)]


def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float32)


def _scale(offset: nn.Parameter | None, like: Tensor) -> Tensor:
    """A scale from its stored deviation, (1,); without one, 1."""
    return torch.ones(1, dtype=torch.float32, device=like.device) if offset is None else 1 + _whole(offset)


def _whole(parameter: Tensor) -> Tensor:
    """The parameter itself; outside of a forward pass, where FSDP 2 and ZeRO-3 have it in parts, gathered."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_id") and not parameter.numel():
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter


@torch.no_grad()
def _assign(
    parameter: nn.Parameter | None, name: str, value: Tensor | list[float] | float, identity: Tensor | int
) -> None:
    """Store a value as its deviation from the identity."""
    if parameter is None:
        raise ValueError(f"{name} is fixed at 1 with learn_scales=False")
    new = torch.atleast_1d(torch.as_tensor(value, dtype=parameter.dtype, device=parameter.device))
    if new.shape != parameter.shape:
        raise ValueError(f"{name} must have shape {tuple(parameter.shape)}, got {tuple(new.shape)}")
    parameter.copy_(new - identity)
