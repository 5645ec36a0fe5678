"""The model that an adapter is for, by its name: whether it is there, its tokenizer and its weights."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .embedded import resolve_model_name
from .lengths import position_limit_of


class BaseModel:
    """A causal language model that transformers itself can make; no code that comes with it is run.

    Args:
        name: `"smollm2"` (the embedded model, which is fetched if it is not there), a hub id or a local folder.

    Raises:
        ValueError: there is no such model, or the embedded one cannot be fetched.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            self.path = resolve_model_name(name)
            AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"the base model {name}: {str(error).splitlines()[0]}") from error

    @cached_property
    def tokenizer(self) -> Any:
        """ValueError if it cannot be loaded."""
        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"the tokenizer of the base model {self.name}: {str(error).splitlines()[0]}") from error

    @cached_property
    def positions(self) -> int | None:
        """How many tokens it takes at all (`lslora.lengths.position_limit`); None for any number."""
        return position_limit_of(self.path)

    def load(self, **options: Any) -> Any:
        """The model, with these options of `from_pretrained`; ValueError if its file was cut short."""
        try:
            return AutoModelForCausalLM.from_pretrained(self.path, trust_remote_code=False, **options)
        except SafetensorError as error:
            raise ValueError(f"the base model {self.name} cannot be read: {error}") from error
