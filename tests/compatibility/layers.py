"""Base layers: the kinds of `tests/test_layer_kinds.py`, each against peft's plain LoRA."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear

from lslora import LSLoraConfig
from tests.test_layer_kinds import KINDS, adapted

from .registry import may_be_refused, operation


def at_the_identity(kind: str, placement: str) -> None:
    make, x = KINDS[kind]
    with may_be_refused():
        ours = adapted(make, placement=placement, extrapolation="linear")
    torch.testing.assert_close(ours(x), adapted(make, LoraConfig)(x), rtol=1e-4, atol=1e-4)


for kind in KINDS:
    operation("Base layers", kind)(lambda placement, kind=kind: at_the_identity(kind, placement))


class Doubled(torch.nn.Linear):
    """A base layer with an adapter of the user's own."""


class DoubledLora(Linear):
    pass


@operation("Base layers", "a custom layer by _register_custom_module")
def custom_module(placement: str) -> None:
    config = LSLoraConfig(target_modules=["0"], placement=placement)
    config._register_custom_module({Doubled: DoubledLora})
    with may_be_refused():
        get_peft_model(torch.nn.Sequential(Doubled(4, 4)), config)


@operation("Base layers", "nn.MultiheadAttention")
def multihead_attention(placement: str) -> None:
    with may_be_refused():
        adapted(lambda: torch.nn.MultiheadAttention(4, 2), placement=placement)
