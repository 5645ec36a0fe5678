"""The layers that send LoRA's update through a spline.

peft picks and builds the LoRA layer for whatever the base layer is; `adopt` then makes that very object an LS-LoRA
layer. So every kind of base layer comes from peft, and none is written again here.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from .config import LSLoraConfig
from .placement import VARIANTS, is_off, whole_layer

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
            return VARIANTS[config.placement]()
        return super().resolve_lora_variant(config=config, **kwargs)  # type: ignore[misc]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As peft's; in one operation where that is possible."""
        whole = None if args or kwargs else whole_layer(self, x)
        return super().forward(x, *args, **kwargs) if whole is None else whole  # type: ignore[misc]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As peft's; raise ValueError, before anything is merged, where an adapter's update is not linear in x."""
        self.check_mergeable(adapter_names)
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the base weight; raise ValueError where the update is not linear in x."""
        self.check_mergeable([adapter])
        delta = super().get_delta_weight(adapter)  # type: ignore[misc]
        plain = adapter not in self.lora_spline or is_off(self.scaling[adapter])  # type: ignore[attr-defined]
        return delta if plain else self.lora_spline[adapter](delta)

    def check_mergeable(self, adapter_names: list[str] | None = None) -> None:
        """Raise ValueError unless all of these adapters, by default the active ones, are linear in x."""
        for name in self.active_adapters if adapter_names is None else adapter_names:  # type: ignore[attr-defined]
            if name in self.lora_spline and not self.lora_variant[name].mergeable:  # type: ignore[attr-defined]
                raise ValueError(NO_MERGE)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, spline in self.lora_spline.items():
            linear, embedding = f"{prefix}lora_A.{name}.", f"{prefix}lora_embedding_A.{name}"
            if any(key == embedding or key.startswith(linear) for key in state_dict):
                _check_loadable(state_dict, [f"{prefix}lora_spline.{name}.{key}" for key in spline.state_dict()])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[misc]


def _check_loadable(state_dict: dict[str, Tensor], keys: list[str]) -> None:
    """Raise ValueError if a spline's tensors are not all there and finite.

    peft loads adapters with `strict=False`, so what is missing would stay the identity without a word.
    """
    for key in keys:
        if key not in state_dict:
            raise ValueError(f"the checkpoint has no {key}: without it the adapter would be plain LoRA")
        tensor = state_dict[key]
        if not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"the checkpoint's {key} must be finite, got {tensor.tolist()}")


class OwnForward:
    """The forward pass of layers whose own adds `B A x` without asking a variant."""

    def forward(self: Any, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.lora_variant:
                dtype = x.dtype if torch.is_autocast_enabled() else self.lora_A[name].weight.dtype
                x = self._cast_input_dtype(x, dtype)
                result = self.lora_variant[name].forward(self, active_adapter=name, x=x, result=result)
        return result


class OwnMixedBatch:
    """Rows through different adapters, for layers whose own method adds `B A x` without asking a variant."""

    def _mixed_batch_forward(self: Any, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for name in self.lora_variant:
            rows = [i for i, wanted in enumerate(adapter_names) if wanted == name]
            if rows:
                result[rows] = self.lora_variant[name].forward(
                    self, active_adapter=name, x=x[rows], result=result[rows]
                )
        return result


# LoRA layers of peft that can be LS-LoRA layers: where they are defined, and what of theirs does without variants.
LAYER_CLASSES: dict[str, tuple[str, tuple[type, ...]]] = {
    "Linear": ("peft.tuners.lora.layer", ()),
    "Embedding": ("peft.tuners.lora.layer", (OwnMixedBatch,)),
    "Conv1d": ("peft.tuners.lora.layer", ()),
    "Conv2d": ("peft.tuners.lora.layer", ()),
    "Conv3d": ("peft.tuners.lora.layer", ()),
    "Linear8bitLt": ("peft.tuners.lora.bnb", ()),
    "Linear4bit": ("peft.tuners.lora.bnb", ()),
    "TorchaoLoraLinear": ("peft.tuners.lora.torchao", ()),
    "IncLoraLinear": ("peft.tuners.lora.inc", ()),
    "GPTQLoraLinear": ("peft.tuners.lora.gptq", ()),
    "HqqLoraLinear": ("peft.tuners.lora.hqq", (OwnMixedBatch,)),
    "AwqLoraLinear": ("peft.tuners.lora.awq", (OwnForward,)),
    "AqlmLoraLinear": ("peft.tuners.lora.aqlm", (OwnForward,)),
    "EetqLoraLinear": ("peft.tuners.lora.eetq", (OwnForward,)),
}


def adopt(layer: LoraLayer) -> None:
    """Make a LoRA layer of peft an LS-LoRA layer, in place; its adapters stay what they are.

    Raises:
        ValueError: the layer's class is not one that is known to work.
    """
    cls = type(layer)
    if LAYER_CLASSES.get(cls.__name__, ("",))[0] != cls.__module__:
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
    _, own = LAYER_CLASSES[base.__name__]
    return type(name, (LSLoraLayer, *own, base), {"__module__": __name__, "__qualname__": name})


def __getattr__(name: str) -> type:
    """The composed classes by name (`LSLoraLinear`, …), made on demand: pickles of whole models look them up here."""
    base = name.removeprefix("LSLora")
    if base == name or base not in LAYER_CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _ = LAYER_CLASSES[base]
    return lslora_class(getattr(import_module(module), base))
