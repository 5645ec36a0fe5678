"""Adapters that may come from anyone are checked before peft makes layers and reads tensors.

peft reads a config before it knows whose it is, and tensors without asking the method. So its functions that do are
put behind checks, in memory; adapters of other methods load as before, unless what they load has splines.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.lora import LoraModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from .adapter_files import check_adapter_files
from .config import LSLoraConfig
from .config_file import brief, read_object, read_settings
from .model import LSLoraModel

METHOD = "LSLORA"


def install() -> None:
    """Put the checks in place; once, since what they wrap is peft's own."""
    _guard_configs()
    _guard_tensors()
    _guard_plain_lora()


def _guard_configs() -> None:
    """Every way to load an adapter reads its config with `PeftConfig.from_json_file`, from the hub's cache too."""
    original = PeftConfig.from_json_file.__func__

    @classmethod  # type: ignore[misc]
    @functools.wraps(original)
    def from_json_file(cls: type, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        path = Path(path_json_file)
        found = read_object(path)
        method = found.get("peft_type")
        if method is None and cls in (PeftConfig, LSLoraConfig):
            raise ValueError(f"{path} must have the key peft_type, which says what kind of adapter it is")
        if method is not None and not (isinstance(method, str) and method in PeftType.__members__):
            raise ValueError(f"{path}: peft_type must be one of those that peft knows, got {brief(method)}")
        if method != METHOD:
            return original(cls, path_json_file, **kwargs)
        return _checked(path)

    PeftConfig.from_json_file = from_json_file


def _checked(path: Path) -> dict[str, Any]:
    """The settings of an LS-LoRA adapter; they, and the tensors beside them if there are any, hold what they must."""
    settings = read_settings(path, LSLoraConfig)
    try:
        config = LSLoraConfig(**settings)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error
    if any((path.parent / name).exists() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        check_adapter_files(path.parent, config)
    return settings


def _guard_tensors() -> None:
    """Tensors go into an adapter that is there already without a look at the config beside them."""
    original = PeftModel.load_adapter

    @functools.wraps(original)
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.base_model, LSLoraModel):
            return original(self, model_id, adapter_name, *args, **kwargs)
        folder = _folder_of(model_id, self._split_kwargs(kwargs)[0])
        if adapter_name in self.peft_config:
            check_adapter_files(folder, self.peft_config[adapter_name])
        try:
            return original(self, model_id, adapter_name, *args, **kwargs)
        except KeyError as error:  # how peft says that there is nothing for modules_to_save or trainable tokens
            raise ValueError(f"{folder}: the checkpoint has no {error}, which its config asks for") from error

    PeftModel.load_adapter = load_adapter


def _guard_plain_lora() -> None:
    """A LoRA adapter would take A and B of an LS-LoRA adapter, and only warn that it has no use for the splines."""
    original = LoraModel._remap_adapter_state_dict_for_load.__func__

    @classmethod  # type: ignore[misc]
    @functools.wraps(original)
    def remap(cls: type, model: Any, config: PeftConfig, adapter_name: str, state_dict: dict[str, Any]) -> Any:
        spline = next((key for key in state_dict if ".lora_spline." in key), None)
        if spline is not None and not isinstance(config, LSLoraConfig):
            raise ValueError(
                f"the adapter {adapter_name!r} must have an LSLoraConfig to be given splines ({spline}), got a "
                f"{type(config).__name__}, whose update is linear"
            )
        return original(cls, model, config, adapter_name, state_dict)

    LoraModel._remap_adapter_state_dict_for_load = remap


def _folder_of(model_id: Any, hub: dict[str, Any]) -> Path:
    """Where an adapter's files lie; from a hub, its safetensors are fetched into the cache, where peft finds them."""
    folder = Path(model_id, hub.get("subfolder") or "")
    if folder.exists():
        return folder
    try:
        return Path(hf_hub_download(model_id, SAFETENSORS_WEIGHTS_NAME, **hub)).parent
    except EntryNotFoundError as error:
        raise ValueError(f"{model_id} must have {SAFETENSORS_WEIGHTS_NAME}: nothing else is read") from error
