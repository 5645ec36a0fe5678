"""The layers that send LoRA's update through a spline.

peft picks and builds the LoRA layer for whatever the base layer is; `adopt` then makes that very object an LS-LoRA
layer. So every kind of base layer comes from peft, and none is written again here.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from .config import LSLoraConfig
from .placement import PLACEMENTS

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
    "LS-LoRA cannot be merged into the base weight unless placement='weight': its update is not linear in x. "
    "Serve the adapter unmerged, as peft does after `PeftModel.from_pretrained`."
)


class LSLoraLayer:
    """A LoRA layer whose update passes through `lora_spline[adapter_name]`; combined with a layer class of peft.

    It derives from `object` alone because CPython lets an object change its class only between compatible layouts.
    """

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_spline")
    lora_spline: nn.ModuleDict

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> LoraVariant | None:
        if isinstance(config, LSLoraConfig):
            return PLACEMENTS[config.placement]()
        return super().resolve_lora_variant(config=config, **kwargs)  # type: ignore[misc]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As peft's; raise ValueError, before anything is merged, where an adapter's update is not linear in x."""
        for name in self.active_adapters if adapter_names is None else adapter_names:  # type: ignore[attr-defined]
            self._check_mergeable(name)
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the base weight; raise ValueError where the update is not linear in x."""
        self._check_mergeable(adapter)
        delta = super().get_delta_weight(adapter)  # type: ignore[misc]
        return self.lora_spline[adapter](delta) if adapter in self.lora_spline else delta

    def _check_mergeable(self, adapter: str) -> None:
        if adapter in self.lora_spline and not self.lora_variant[adapter].mergeable:  # type: ignore[attr-defined]
            raise ValueError(NO_MERGE)


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
