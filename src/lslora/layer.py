"""The spline's module, and the layers that send LoRA's update through it.

peft picks and builds the LoRA layer for whatever the base layer is; `adopt` then makes that very object an LS-LoRA
layer. So every kind of base layer comes from peft, and none is written again here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from . import penalty
from .config import LSLoraConfig
from .ops.spline import spline

# LoRA layers that hand the update to their variant, and where peft defines them. Others (AWQ, EETQ, AQLM, …) ignore
# variants, so LS-LoRA would silently be plain LoRA there.
LAYER_CLASSES = {
    "Linear": "peft.tuners.lora.layer",
    "Conv1d": "peft.tuners.lora.layer",
    "Conv2d": "peft.tuners.lora.layer",
    "Conv3d": "peft.tuners.lora.layer",
    "Linear8bitLt": "peft.tuners.lora.bnb",
    "Linear4bit": "peft.tuners.lora.bnb",
}

NO_MERGE = (
    "LS-LoRA cannot be merged into the base weight: its update φ(scaling · B A x) is not linear in x. "
    "Serve the adapter unmerged, as peft does after `PeftModel.from_pretrained`."
)


class Spline(nn.Module):
    """`output_scale · φ(input_scale · clamp(z, k_min, k_max))`, elementwise, φ learnable, at first `φ(t) = t`.

    Stored and trained are the deviations from the identity: zeros at the start, in fp32 always.

    | stored as | shape | meaning |
    |---|---|---|
    | `weight` | (K,) | `values − grid` |
    | `input_scale_offset` | (1,) | `input_scale − 1` |
    | `output_scale_offset` | (1,) | `output_scale − 1` |

    Args:
        config: The adapter's settings; the fields of the spline are read.
    """

    def __init__(self, config: LSLoraConfig) -> None:
        super().__init__()
        self.k_min = float(config.k_min)
        self.k_max = float(config.k_max)
        self.interpolation_method = config.interpolation_method
        self.extrapolation = config.extrapolation
        self.soft_temperature = float(config.soft_temperature)
        self.spline_reg_weight = float(config.spline_reg_weight)
        # FSDP's wrapping policy for peft looks for trainable leaves by the name `weight`.
        self.weight = nn.Parameter(torch.zeros(config.num_knots, dtype=torch.float32))
        self.input_scale_offset = nn.Parameter(torch.zeros(1, dtype=torch.float32))
        self.output_scale_offset = nn.Parameter(torch.zeros(1, dtype=torch.float32))
        penalty.track(self)

    @property
    def grid(self) -> Tensor:
        """Knot positions `k_i`, (K,) fp32: evenly spaced on [k_min, k_max]."""
        return torch.linspace(self.k_min, self.k_max, len(self.weight), device=self.weight.device)

    @property
    def values(self) -> Tensor:
        """Knot heights `v_i`, (K,) fp32."""
        return self.grid + self.weight

    @values.setter
    def values(self, values: Tensor | list[float]) -> None:
        _assign(self.weight, "values", values, self.grid)

    @property
    def input_scale(self) -> Tensor:
        """Factor on φ's argument, (1,) fp32."""
        return 1 + self.input_scale_offset

    @input_scale.setter
    def input_scale(self, scale: Tensor | float) -> None:
        _assign(self.input_scale_offset, "input_scale", scale, 1)

    @property
    def output_scale(self) -> Tensor:
        """Factor on φ's value, (1,) fp32."""
        return 1 + self.output_scale_offset

    @output_scale.setter
    def output_scale(self, scale: Tensor | float) -> None:
        _assign(self.output_scale_offset, "output_scale", scale, 1)

    def forward(self, z: Tensor) -> Tensor:
        """Shape and dtype of `z`, any shape; see `lslora.ops.spline.spline`."""
        return spline(
            z,
            self.weight,
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
            f"num_knots={len(self.weight)}, k_min={self.k_min}, k_max={self.k_max}, "
            f"interpolation_method={self.interpolation_method!r}, extrapolation={self.extrapolation!r}"
        )

    # The offsets are too small for half precision (FIXES_APPLIED.md, 9), yet everyone casts adapters: peft to the base
    # layer's dtype, users with `model.half()`, TRL by assigning to `.data` before training. The three methods below
    # keep fp32.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Spline:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self

    def train(self, mode: bool = True) -> Spline:
        if mode:
            self._restore_fp32()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore_fp32()
        super()._load_from_state_dict(*args, **kwargs)

    def _restore_fp32(self) -> None:
        for parameter in self.parameters(recurse=False):
            if parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        penalty.track(self)


class SplineVariant(LoraVariant):
    """What peft's LoRA layers call in place of the plain update."""

    def supports_lora_conversion(self) -> bool:
        return False

    @staticmethod
    def init(module: Any, adapter_name: str, config: LSLoraConfig, **kwargs: Any) -> None:
        module.lora_spline[adapter_name] = Spline(config)
        # peft has moved A and B by now; the spline follows them.
        module._move_adapter_to_device_of_base_layer(adapter_name)

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """`result + spline(scaling · B A dropout(x))`, in the dtype of `result`."""
        lora_A = module.lora_A[active_adapter]  # noqa: N806
        lora_B = module.lora_B[active_adapter]  # noqa: N806
        dropout = module.lora_dropout[active_adapter]
        z = lora_B(lora_A(dropout(x))) * module.scaling[active_adapter]
        return (result + module.lora_spline[active_adapter](z)).to(result.dtype)


class LSLoraLayer:
    """A LoRA layer whose update passes through `lora_spline[adapter_name]`; combined with a layer class of peft.

    It derives from `object` alone because CPython lets an object change its class only between compatible layouts.
    """

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_spline")
    lora_spline: nn.ModuleDict

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> LoraVariant | None:
        if isinstance(config, LSLoraConfig):
            return SplineVariant()
        return super().resolve_lora_variant(config=config, **kwargs)  # type: ignore[misc]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise ValueError if one of the adapters to merge has a spline."""
        names = self.active_adapters if adapter_names is None else adapter_names  # type: ignore[attr-defined]
        if any(name in self.lora_spline for name in names):
            raise ValueError(NO_MERGE)
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Raise ValueError if the adapter has a spline: no weight has its effect."""
        if adapter in self.lora_spline:
            raise ValueError(NO_MERGE)
        return super().get_delta_weight(adapter)  # type: ignore[misc]


def adopt(layer: LoraLayer) -> None:
    """Make a LoRA layer of peft an LS-LoRA layer, in place; its adapters stay what they are.

    Raises:
        ValueError: the layer's class does not hand its update to a variant.
    """
    cls = type(layer)
    if LAYER_CLASSES.get(cls.__name__) != cls.__module__:
        raise ValueError(
            f"LS-LoRA does not support base layers that peft adapts with {cls.__module__}.{cls.__name__}; "
            f"supported are {', '.join(LAYER_CLASSES)}"
        )
    layer.__class__ = lslora_class(cls)  # type: ignore[arg-type]
    layer.lora_spline = nn.ModuleDict()


@cache
def lslora_class(base: type) -> type:
    """The class `LSLora<Base>` composed of `LSLoraLayer` and peft's layer class."""
    name = f"LSLora{base.__name__}"
    return type(name, (LSLoraLayer, base), {"__module__": __name__, "__qualname__": name})


def __getattr__(name: str) -> type:
    """The composed classes by name (`LSLoraLinear`, …), made on demand: pickles of whole models look them up here."""
    base = name.removeprefix("LSLora")
    if base == name or base not in LAYER_CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return lslora_class(getattr(import_module(LAYER_CLASSES[base]), base))


@torch.no_grad()
def _assign(parameter: nn.Parameter, name: str, value: Tensor | list[float] | float, identity: Tensor | int) -> None:
    """Store a value as its deviation from the identity."""
    new = torch.atleast_1d(torch.as_tensor(value, dtype=parameter.dtype, device=parameter.device))
    if new.shape != parameter.shape:
        raise ValueError(f"{name} must have shape {tuple(parameter.shape)}, got {tuple(new.shape)}")
    parameter.copy_(new - identity)
