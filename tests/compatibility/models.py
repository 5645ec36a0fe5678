"""The small models that operations run on, and the comparisons that most of them end with."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lslora import LSLoraConfig, Spline

IDS = torch.arange(12).reshape(2, 6)
SIZES = {
    **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64},
}
VALUES = [-4.0, -1.0, 0.1, 2.0, 3.5]


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **settings)).eval()


def adapted(placement: str | None, base: Any = None, **settings: Any) -> Any:
    """The base with an LS-LoRA adapter whose A and B are random, or LoRA's (`placement=None`) of the same A and B."""
    base = llama() if base is None else base
    torch.manual_seed(1)
    defaults = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    if getattr(base, "config", None) is not None:
        defaults["task_type"] = "CAUSAL_LM"
    settings = {**defaults, **settings}
    if placement is None:
        return get_peft_model(base, LoraConfig(**settings)).eval()
    return get_peft_model(base, LSLoraConfig(placement=placement, **{"extrapolation": "linear", **settings})).eval()


def splines(model: nn.Module) -> list[Spline]:
    return [module for module in model.modules() if isinstance(module, Spline)]


def bend(model: nn.Module) -> nn.Module:
    """Give every spline a shape of its own, with φ(0) ≠ 0."""
    generator = torch.Generator().manual_seed(2)
    for spline in splines(model):
        spline.values = 0.1 + spline.grid * (1 + torch.rand(len(spline.weight), generator=generator))
    return model


@torch.no_grad()
def logits(model: Any, **kwargs: Any) -> Tensor:
    return model(IDS, **kwargs).logits


def check_like_lora(placement: str, base: Any = llama, **settings: Any) -> None:
    """At the identity equal to LoRA; splines get gradients; saved and loaded again, equal bit for bit."""
    plain, ours = adapted(None, base(), **settings), adapted(placement, base(), **settings)
    torch.testing.assert_close(logits(ours), logits(plain), rtol=1e-4, atol=1e-4)
    bend(ours)
    assert not torch.allclose(logits(ours), logits(plain))
    check_gradients(ours)
    check_saving(ours, base)


def check_gradients(model: Any) -> None:
    model(IDS).logits.square().mean().backward()
    assert splines(model)
    for spline in splines(model):
        assert spline.weight.grad is not None and spline.weight.grad.isfinite().all()
        assert spline.weight.grad.abs().sum() > 0


def check_saving(model: Any, base: Any = llama, **kwargs: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **kwargs)
        again = PeftModel.from_pretrained(base(), folder).eval()
        assert torch.equal(logits(again), logits(model))
