"""The spline's module: its parameters, how they are stored, and by which operation it is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import penalty
from .config import LSLoraConfig
from .grid import MeasuredGrid
from .ops.linear import adapted_linear, backend_for_layer
from .ops.spline import spline
from .ops.update import backend_for, update


class Spline(MeasuredGrid):
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
        super().__init__(config)
        self.interpolation_method = config.interpolation_method
        self.extrapolation = config.extrapolation
        self.soft_temperature = float(config.soft_temperature)
        self.spline_reg_weight = float(config.spline_reg_weight)
        # FSDP's wrapping policy for peft looks for trainable leaves by the name `weight`.
        self.weight = nn.Parameter(_zeros(config.num_knots))
        self.input_scale_offset = nn.Parameter(_zeros(1)) if config.learn_scales else None
        self.output_scale_offset = nn.Parameter(_zeros(1)) if config.learn_scales else None
        # Where no optimizer steps these very parameters (`lslora.training.prepare_for_deepspeed`): the backward passes
        # in a step, which share the penalty's gradient. Otherwise None.
        self.micro_batches: int | None = None
        penalty.track(self)

    @property
    def offsets(self) -> Tensor:
        """Deviations from the identity, `v_i − k_i`, (K,) fp32."""
        return whole(self.weight)

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

    def forward(self, z: Tensor) -> Tensor:
        """Shape and dtype of `z`, any shape; see `lslora.ops.spline.spline`."""
        self._check_engine()
        if self.grid_scale is None:
            return self._spline(z)
        if self.waits:
            self._check_waiting()
            self._see(z)
            nothing = torch.cat([zeros for zeros in self._nothing() if zeros is not None]).sum()
            return z + nothing.to(z.dtype)
        # Zero where a hot swap has put an adapter whose grid still waits; its offsets are zero as well.
        stretch = torch.where(self.grid_scale > 0, self.grid_scale, 1.0)
        return (self._spline(z / stretch) * stretch).to(z.dtype)

    def update(self, result: Tensor, h: Tensor, weight: Tensor, scaling: float) -> Tensor | None:
        """`result + self(scaling · h weightᵀ)` in one operation; None where it takes several now.

        See `lslora.ops.update.update`.
        """
        self._check_engine()
        if not self._is_quick():
            return None
        backend = backend_for((result, h, weight), h.dtype, h.shape[-1], self.num_knots)
        if isinstance(backend, str):
            return None
        tensors, settings = self._operands()
        return update(result, h, weight, *tensors, scaling=scaling, backend=backend, **settings)

    def adapted_linear(
        self, x: Tensor, base: nn.Linear, dropout: nn.Module, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor | None:
        """`base(x) + self(scaling · b a dropout(x))` in one operation; None where it takes several now.

        See `lslora.ops.linear.adapted_linear`.
        """
        self._check_engine()
        if not self._is_quick():
            return None
        layer = x, base.weight, base.bias, a, b
        backend = backend_for_layer(*layer, self.num_knots)
        if isinstance(backend, str):
            return None
        dropped, (tensors, settings) = dropout(x), self._operands()
        dropped = None if dropped is x else dropped
        return adapted_linear(*layer, *tensors, scaling=scaling, dropped=dropped, backend=backend, **settings)

    def _is_quick(self) -> bool:
        """Whether one operation may do; ValueError where a grid waits that cannot be measured."""
        if self.interpolation_method != "piecewise":
            return False
        if self.waits:
            self._check_waiting()
            return not self._wants_to_see()
        return True

    def _operands(self) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], dict[str, Any]]:
        """What one operation takes of the spline: the offsets of its knots and scales, and settings by name."""
        settings = {"k_min": self.k_min, "k_max": self.k_max}
        if self.waits:  # the identity everywhere
            return self._nothing(), {**settings, "stretch": None, "extrapolation": "linear"}
        tensors = self._offsets(), self.input_scale_offset, self.output_scale_offset
        return tensors, {**settings, "stretch": self.grid_scale, "extrapolation": self.extrapolation}

    def _nothing(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Zeros in which every parameter takes part, as data parallelism wants it, without learning."""
        scale_in, scale_out = (
            None if scale is None else 0 * scale for scale in (self.input_scale_offset, self.output_scale_offset)
        )
        return 0 * self.weight, scale_in, scale_out

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

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        penalty.track(self)


def splines_of(model: nn.Module) -> list[Spline]:
    """All splines of `model`, in its order."""
    return [module for module in model.modules() if isinstance(module, Spline)]


def spline_penalty(model: nn.Module) -> Tensor:
    """The value of the penalty, summed over all splines of `model`: a scalar in fp32 that autograd can differentiate.

    It is on the device of the first spline, and for those who want to see it: training needs no call of this
    (`lslora.penalty`).
    """
    terms = [penalty.value(spline) for spline in splines_of(model)]
    if not terms:
        return torch.zeros((), dtype=torch.float32)
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float32)


def _scale(offset: nn.Parameter | None, like: Tensor) -> Tensor:
    """A scale from its stored deviation, (1,); without one, 1."""
    return torch.ones(1, dtype=torch.float32, device=like.device) if offset is None else 1 + whole(offset)


def whole(parameter: Tensor) -> Tensor:
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
