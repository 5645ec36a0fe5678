"""Where in LoRA's update the spline sits: one class for each placement, called by peft's layers for the plain update.

Each adds its update to the base layer's `result` and returns that in the dtype of `result`. A, B are the adapter's
weights, `s` its scaling, φ its spline with both scales, `x` (…, in) with dropout applied.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.nn.functional import linear

from .config import LSLoraConfig
from .spline import Spline


class SplineVariant(LoraVariant):
    """What the placements share: making the spline beside A and B."""

    mergeable = False

    def supports_lora_conversion(self) -> bool:
        return self.mergeable

    @staticmethod
    def init(module: Any, adapter_name: str, config: LSLoraConfig, **kwargs: Any) -> None:
        module.lora_spline[adapter_name] = Spline(config)
        # peft has moved A and B by now; the spline follows them.
        module._move_adapter_to_device_of_base_layer(adapter_name)


class OutputVariant(SplineVariant):
    """`W0 x + φ(s B A x)`: elementwise on tokens × out."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        lora_A, lora_B, dropout, scaling, spline = _parts(module, active_adapter)  # noqa: N806
        return (result + spline(lora_B(lora_A(dropout(x))) * scaling)).to(result.dtype)


class BottleneckVariant(SplineVariant):
    """`W0 x + s B φ(A x)`: elementwise on tokens × r, next to nothing."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        lora_A, lora_B, dropout, scaling, spline = _parts(module, active_adapter)  # noqa: N806
        return (result + lora_B(spline(lora_A(dropout(x)))) * scaling).to(result.dtype)


class WeightVariant(SplineVariant):
    """`W0 x + φ(s B A) x`: elementwise on out × in, linear in x, so it merges into the base weight."""

    mergeable = True

    @staticmethod
    def init(module: Any, adapter_name: str, config: LSLoraConfig, **kwargs: Any) -> None:
        if isinstance(module.get_base_layer(), (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            raise ValueError("placement='weight' supports linear layers only, got a convolution")
        SplineVariant.init(module, adapter_name, config)

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        lora_A, lora_B, dropout, scaling, spline = _parts(module, active_adapter)  # noqa: N806
        delta = spline(lora_B.weight @ lora_A.weight * scaling)
        return (result + linear(dropout(x), delta)).to(result.dtype)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + _delta(module, active_adapter, orig_weight)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += _delta(module, active_adapter, orig_weight)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - _delta(module, active_adapter, orig_weight)


PLACEMENTS = {"output": OutputVariant, "bottleneck": BottleneckVariant, "weight": WeightVariant}


def _delta(module: Any, name: str, like: Tensor) -> Tensor:
    """What merging adds, in the dtype of the weight it goes to."""
    if not like.is_floating_point():
        raise ValueError(f"merging needs a floating-point base weight, got {like.dtype}")
    return module.get_delta_weight(name).to(like.dtype)


def _parts(module: Any, name: str) -> tuple[Any, Any, Any, float, Spline]:
    """A, B, dropout, scaling and spline of one adapter."""
    return (
        module.lora_A[name],
        module.lora_B[name],
        module.lora_dropout[name],
        module.scaling[name],
        module.lora_spline[name],
    )
