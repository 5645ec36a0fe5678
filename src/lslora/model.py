"""LSLoraModel: peft's LoraModel with a spline behind every layer's update."""

from __future__ import annotations

from typing import Any, NoReturn

from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils.save_and_load import _validate_lora_adapter_state_dict
from torch import Tensor, nn

from .config import LSLoraConfig
from .layer import LSLoraLayer, adopt


class LSLoraModel(LoraModel):
    """Adds LS-LoRA adapters to a model; see `LSLoraConfig` for the settings.

    Everything but the layers' update is `peft.LoraModel`'s: targeting, ranks, several adapters, saving and loading.
    Merging raises ValueError where the update is not linear in the layer's input, so unless `placement="weight"`.
    """

    def _create_and_replace(
        self, lora_config: LSLoraConfig, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        # A plain LoRA layer from an earlier adapter would take this one for plain LoRA as well.
        if isinstance(target, LoraLayer) and not isinstance(target, LSLoraLayer):
            adopt(target)
        super()._create_and_replace(lora_config, adapter_name, target, *args, **kwargs)

    @staticmethod
    def _create_new_module(
        lora_config: LSLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        if isinstance(target, nn.MultiheadAttention):
            raise ValueError("LS-LoRA does not support nn.MultiheadAttention: peft merges the update to run it")
        module = LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        adopt(module)
        module.lora_variant[adapter_name] = module.resolve_lora_variant(config=lora_config)
        module.lora_variant[adapter_name].init(module, adapter_name=adapter_name, config=lora_config)
        module.set_adapter(module.active_adapters, inference_mode=lora_config.inference_mode)
        return module

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, adapter_name: str, **kwargs: Any) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(*args, adapter_name=adapter_name, **kwargs)
        # A warning where a sharding engine's pieces would be saved for the whole; peft has it for LORA by name.
        _validate_lora_adapter_state_dict(found, adapter_name)
        return found

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ValueError: a weighted sum of nonlinear updates is no LS-LoRA update."""
        raise ValueError(
            "LS-LoRA adapters cannot be combined into one: a weighted sum of updates through different splines is "
            "not an update through one spline. Activate several adapters, or name one per row with `adapter_names`."
        )
