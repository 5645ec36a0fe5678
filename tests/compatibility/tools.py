"""What torch, accelerate and others do with a model as a whole."""

from __future__ import annotations

import io
import tempfile
from typing import Any

import torch
from accelerate import cpu_offload
from peft import get_peft_model
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import MixtralConfig, MixtralForCausalLM

from lslora import LSLoraConfig

from .models import SIZES, adapted, bend, llama, logits
from .registry import may_be_refused, operation

GROUP = "Tools"
X = torch.linspace(-2, 2, 32).view(4, 8)


def small(placement: str) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh())
    config = LSLoraConfig(placement=placement, r=2, target_modules=["0"], init_lora_weights=False)
    return bend(get_peft_model(net, config)).eval()


@operation(GROUP, "torch.jit.trace, torch.jit.save")
def trace(placement: str) -> None:
    model, file = small(placement), io.BytesIO()
    with may_be_refused(), torch.no_grad():
        torch.jit.save(torch.jit.trace(model, (X,)), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(X.flip(0)), model(X.flip(0)))


@operation(GROUP, "make_fx")
def fx(placement: str) -> None:
    model = small(placement)
    with may_be_refused(), torch.no_grad():
        graph = make_fx(model)(X)
    torch.testing.assert_close(graph(X.flip(0)), model(X.flip(0)))


@operation(GROUP, "torch.export")
def export(placement: str) -> None:
    model = small(placement)
    with may_be_refused():
        program = torch.export.export(model, (X,))
    torch.testing.assert_close(program.module()(X.flip(0)), model(X.flip(0)))


@operation(GROUP, "torch.func: a gradient for each row")
def per_row_gradients(placement: str) -> None:
    model = small(placement)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (row,)).square().sum()

    with may_be_refused():
        found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, X)
    model(X).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[name].sum(0), p.grad, rtol=1e-4, atol=1e-4)


@operation(GROUP, "gradients of gradients")
def double_backward(placement: str) -> None:
    model = small(placement)
    x = X.clone().requires_grad_()
    with may_be_refused():
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()


@operation(GROUP, "accelerate's cpu_offload")
def offload(placement: str) -> None:
    model = bend(adapted(placement))
    expected = logits(model)
    with may_be_refused():
        found = logits(cpu_offload(model, execution_device="cpu"))
    torch.testing.assert_close(found, expected)


@operation(GROUP, "experts of a mixture, which are parameters in transformers 5")
def experts(placement: str) -> None:
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2))
    with may_be_refused():
        get_peft_model(model, LSLoraConfig(placement=placement, target_modules=["q_proj", "w1", "w2", "w3"]))
    raise AssertionError("experts were left out")


@operation(GROUP, "save_pretrained with path_initial_model_for_weight_conversion")
def save_as_lora(placement: str) -> None:
    model = adapted(placement)
    with tempfile.TemporaryDirectory() as folder, may_be_refused():
        model.save_pretrained(f"{folder}/new", path_initial_model_for_weight_conversion=f"{folder}/initial")
    raise AssertionError("an adapter without splines was saved")


@operation(GROUP, "from_pretrained with ignore_mismatched_sizes")
def mismatched_sizes(placement: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        adapted(placement, llama(), target_modules=["lm_head"]).save_pretrained(folder)
        other = llama()
        other.resize_token_embeddings(40)
        with may_be_refused():
            type(adapted(placement)).from_pretrained(other, folder, ignore_mismatched_sizes=True)
    raise AssertionError("tensors of another size were passed over")


@operation(GROUP, "transformers' load_adapter with hotswap")
def transformers_hotswap(placement: str) -> None:
    config = LSLoraConfig(placement=placement, r=2, target_modules=["q_proj"], init_lora_weights=False)
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(llama(), config).save_pretrained(folder)
        model = llama()
        model.load_adapter(folder)
        with may_be_refused():
            model.load_adapter(folder, adapter_name="default", hotswap=True)
    raise AssertionError("transformers knows of no hot swap but LoRA's")
