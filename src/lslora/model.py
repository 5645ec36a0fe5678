"""LSLoraModel: peft's LoraModel with a spline behind every layer's update."""

from __future__ import annotations

import copy
import re
from collections.abc import Set
from typing import Any, NoReturn

from peft import PeftType
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils.save_and_load import _validate_lora_adapter_state_dict
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn

from .config import LSLoraConfig
from .config_file import brief
from .layer import LSLoraLayer, adopt
from .placement import CONVOLUTIONS, NO_CONVOLUTIONS


class LSLoraModel(LoraModel):
    """Adds LS-LoRA adapters to a model; see `LSLoraConfig` for the settings.

    Everything but the layers' update is `peft.LoraModel`'s: targeting, ranks, several adapters, saving and loading.
    Merging raises ValueError where the update is not linear in the layer's input, so unless `placement="weight"`.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # peft makes a folder of this name when it saves, and a module, whose name must have no dot.
        if not re.fullmatch(r"[^\x00-\x1f\x7f/\\.]+", adapter_name):
            raise ValueError(
                f"an adapter's name must have no dot, no slash and no control character, got {adapter_name!r}"
            )
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except IndexError as error:
            config = self.peft_config[adapter_name]
            raise ValueError(
                "layer_replication and trainable_token_indices must name layers and tokens that the model has, got "
                f"{brief(config.layer_replication)} and {brief(config.trainable_token_indices)}"
            ) from error

    def _prepare_model(self, peft_config: LSLoraConfig, model: nn.Module) -> None:
        _check_targets(peft_config, model)
        super()._prepare_model(peft_config, model)

    def _check_target_module_compatiblity(self, peft_config: LSLoraConfig, model: nn.Module, target_name: str) -> None:
        # Mamba's kernels read some layers' weights past the adapter; peft has that list for LORA by name.
        super()._check_target_module_compatiblity(_as_lora(peft_config), model, target_name)

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
        module = LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        adopt(module)
        module.lora_variant[adapter_name] = module.resolve_lora_variant(config=lora_config)
        module.lora_variant[adapter_name].init(module, adapter_name=adapter_name, config=lora_config)
        module.set_adapter(module.active_adapters, inference_mode=lora_config.inference_mode)
        return module

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As peft's; raise ValueError, before any layer is merged, where an update is not linear in x."""
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """As peft's; raise ValueError, before any layer is merged, where an update is not linear in x."""
        self._check_mergeable(adapter_names)
        return super().merge_and_unload(progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        for layer in (module for module in self.model.modules() if isinstance(module, LSLoraLayer)):
            layer.check_mergeable(adapter_names)

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            "path_initial_model_for_weight_conversion writes plain LoRA of twice the rank, which has no splines: "
            "save without it"
        )

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, adapter_name: str, **kwargs: Any) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(*args, adapter_name=adapter_name, **kwargs)
        # A warning where a sharding engine's pieces would be saved for the whole; peft has it for LORA by name.
        _validate_lora_adapter_state_dict(found, adapter_name)
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        known = model.state_dict()
        # A module that the model holds under several names is in a file under the first alone.
        own = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
        _check_complete(known, known.keys() - own, adapter_name, found)
        return found

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ValueError: a weighted sum of nonlinear updates is no LS-LoRA update."""
        raise ValueError(
            "LS-LoRA adapters cannot be combined into one: a weighted sum of updates through different splines is "
            "not an update through one spline. Activate several adapters, or name one per row with `adapter_names`."
        )


def _check_targets(config: LSLoraConfig, model: nn.Module) -> None:
    """Raise ValueError, before a layer is made, for targets that cannot have a spline."""
    if config.target_modules is None:  # peft asks for them, or has a state dict that names the layers
        return
    for name, module in model.named_modules():
        if not LSLoraModel._check_target_module_exists(config, name):
            continue
        if isinstance(module, nn.MultiheadAttention):
            raise ValueError(
                f"LS-LoRA does not support nn.MultiheadAttention ({name}): peft merges the update to run it"
            )
        base = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if config.placement == "weight" and isinstance(base, CONVOLUTIONS):
            raise ValueError(f"{NO_CONVOLUTIONS} ({name})")
    as_lora = _as_lora(config)
    if isinstance(as_lora.target_modules, set):
        # Those with a part of the way to a layer; by the last name alone peft would take them for an expert's.
        as_lora.target_modules = {t for t in as_lora.target_modules if "." not in t or not _is_layer(t, model)}
    if hasattr(model, "config") and as_lora.target_modules:
        convert_peft_config_for_transformers(as_lora, model, conversions=None)
    if as_lora.target_parameters:
        raise ValueError(
            f"target_modules must name layers, but {sorted(as_lora.target_parameters)} are parameters of this model "
            "(the experts of a mixture), in which peft merges the update: LS-LoRA cannot do that. Name other layers, "
            "those of the attention for example, one by one; 'all-linear' means the experts too"
        )


def _is_layer(target: str, model: nn.Module) -> bool:
    return any(name == target or name.endswith(f".{target}") for name, _ in model.named_modules())


def _as_lora(config: LSLoraConfig) -> LSLoraConfig:
    """The same settings under the name that peft looks for where it treats LoRA apart."""
    as_lora = copy.deepcopy(config)
    as_lora.peft_type = PeftType.LORA
    return as_lora


def _check_complete(known: dict[str, Tensor], aliases: Set[str], adapter_name: str, found: dict[str, Tensor]) -> None:
    """Raise ValueError unless a checkpoint has what the model's adapter has, in the same shapes, and finite.

    peft loads adapters with `strict=False`: what is missing would stay as it was drawn, what is surplus would be
    dropped, without an error. What a spline needs its layer checks. `aliases` are further names of what is `known`.
    """
    own = re.compile(rf".*\.lora_(A|B|embedding_A|embedding_B)\.{re.escape(adapter_name)}(\..+)?")
    for key in known.keys() - aliases - found.keys():
        if own.fullmatch(key):
            raise ValueError(f"the checkpoint has no {key}, which the adapter's config asks for")
    for key, tensor in found.items():
        if ".lora_" not in key:
            continue
        if key not in known:
            raise ValueError(f"the checkpoint has {key}, for which the model has no adapted layer")
        # ZeRO-3 leaves nothing of a parameter outside of its module's forward.
        if known[key].numel() and known[key].shape != tensor.shape:
            raise ValueError(f"size mismatch for {key}: must be {tuple(known[key].shape)}, got {tuple(tensor.shape)}")
        if own.fullmatch(key) and not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"the checkpoint's {key} must be finite")
