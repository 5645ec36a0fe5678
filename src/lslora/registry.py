"""Makes peft know the method: adds LSLORA to its tables and guards its adapters' files, in memory and once."""

from __future__ import annotations

import sys
from importlib.metadata import requires, version
from typing import Any

from packaging.requirements import Requirement

METHOD = "LSLORA"

# Settings that must agree for one adapter to take the place of another without rebuilding the layers.
HOTSWAP_KEYS = [
    *("use_rslora", "lora_dropout", "alpha_pattern", "use_dora"),
    *("placement", "num_knots", "k_min", "k_max", "interpolation_method", "extrapolation", "soft_temperature"),
    *("learn_scales", "calibration_steps"),
]


def check_peft_version(installed: str) -> None:
    """Raise ImportError, naming the versions that work, if `installed` is not one of those this package requires."""
    requirements = map(Requirement, requires("lslora") or ())
    supported = next(r.specifier for r in requirements if r.name == "peft")
    if not supported.contains(installed, prereleases=True):
        raise ImportError(f"lslora works with peft {supported}, but peft {installed} is installed")


def add_enum_member(enum: Any, name: str) -> None:
    """Add the member `name = "name"` to a string enum that is already defined.

    The enum module offers no way to do this, so what its own class construction writes is written here. Name and value
    are equal because peft indexes its tables with the string read from JSON, and enums hash by name.
    """
    member: Any = str.__new__(enum, name)
    member._name_ = member._value_ = name
    member.__objclass__ = enum
    member._sort_order_ = len(enum._member_names_)
    type.__setattr__(enum, name, member)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[name] = member
    if sys.version_info >= (3, 13):
        enum._hashable_values_.append(name)


def register() -> None:
    """Add LSLORA to peft's methods, and check the files of its adapters; a second call does nothing."""
    check_peft_version(version("peft"))

    from peft import PeftType
    from peft.utils import register_peft_method
    from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK

    if METHOD in PeftType.__members__:
        return
    add_enum_member(PeftType, METHOD)

    from . import guards
    from .config import LSLoraConfig
    from .model import LSLoraModel

    register_peft_method(name="lslora", config_cls=LSLoraConfig, model_cls=LSLoraModel, prefix=LSLoraModel.prefix)
    CONFIG_KEYS_TO_CHECK[PeftType(METHOD)] = HOTSWAP_KEYS
    guards.install()
