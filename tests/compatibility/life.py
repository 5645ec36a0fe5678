"""The life of an adapter: from a second one beside it to saving, swapping, merging and removing."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from lslora import LSLoraConfig, LSLoraLayer

from .models import adapted, bend, check_gradients, check_saving, llama, logits, splines
from .registry import may_be_refused, operation

GROUP = "Life of an adapter"


def other(placement: str, **settings: Any) -> LSLoraConfig:
    """Another rank, other targets, other knots."""
    defaults = {"r": 3, "target_modules": ["q_proj", "v_proj"], "num_knots": 7, "k_min": -5.0, "k_max": 9.0}
    return LSLoraConfig(placement=placement, **{**defaults, "init_lora_weights": False, **settings})


def with_two(placement: str) -> Any:
    model = adapted(placement)
    model.add_adapter("other", other(placement))
    return bend(model).eval()


@operation(GROUP, "a second adapter with other rank, targets, knots and range")
def second_adapter(placement: str) -> None:
    with may_be_refused():
        model = with_two(placement)
    first = logits(model)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.allclose(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    check_gradients(adapted(placement))


@operation(GROUP, "two adapters of different placements")
def two_placements(placement: str) -> None:
    model = adapted(placement)
    alone = logits(bend(model))
    with may_be_refused():
        model.add_adapter("other", other("bottleneck"))
    assert torch.equal(logits(model), alone)
    model.set_adapter("other")
    assert not torch.allclose(logits(model), alone)


@operation(GROUP, "both active at once")
def both_active(placement: str) -> None:
    model = with_two(placement)
    first = logits(model)
    with may_be_refused():
        model.base_model.set_adapter(["default", "other"])
    assert not torch.allclose(logits(model), first)


@operation(GROUP, "delete_adapter")
def delete(placement: str) -> None:
    model = with_two(placement)
    first = logits(model)
    with may_be_refused():
        model.delete_adapter("other")
    assert torch.equal(logits(model), first)
    assert not any("other" in name for name in model.state_dict())


@operation(GROUP, "mixed batch by adapter_names")
def mixed_batch(placement: str) -> None:
    model = with_two(placement)
    with may_be_refused():
        mixed = logits(model, adapter_names=["other", "__base__"])
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], logits(model)[1], rtol=1e-6, atol=1e-6)
    model.set_adapter("other")
    torch.testing.assert_close(mixed[0], logits(model)[0], rtol=1e-6, atol=1e-6)


@operation(GROUP, "disable_adapter, unload: the base bit for bit")
def disable_and_unload(placement: str) -> None:
    expected = logits(llama())
    model = bend(adapted(placement))
    assert not torch.equal(logits(model), expected)
    with may_be_refused():
        with model.disable_adapter():
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model.unload()), expected)


@operation(GROUP, "rescale_adapter_scale, to 0")
def rescale(placement: str) -> None:
    model = bend(adapted(placement))
    with may_be_refused(), rescale_adapter_scale(model, 0.0):
        scaled = logits(model)
    torch.testing.assert_close(scaled, logits(llama()))


def check_name(name: str, placement: str) -> None:
    model = llama()
    config = LSLoraConfig(placement=placement, r=2, target_modules=["q_proj"], init_lora_weights=False)
    with may_be_refused():
        model = get_peft_model(model, config, adapter_name=name).eval()
    bend(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(llama(), f"{folder}/{name}", adapter_name=name).eval()
    assert torch.equal(logits(again), logits(model))


for name in ("lora", "spline", "values", "weight", "lora_spline", "with.dot", "__base__"):
    operation(GROUP, f"an adapter named {name!r}")(lambda placement, name=name: check_name(name, placement))


@operation(GROUP, "save_pretrained, PeftModel.from_pretrained")
def save_and_load(placement: str) -> None:
    with may_be_refused():
        check_saving(bend(adapted(placement)))


@operation(GROUP, "save_pretrained without safetensors")
def save_without_safetensors(placement: str) -> None:
    model = bend(adapted(placement))
    with may_be_refused():
        check_saving(model, safe_serialization=False)


@operation(GROUP, "AutoPeftModelForCausalLM, PeftConfig.from_pretrained")
def auto_classes(placement: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        llama().save_pretrained(f"{folder}/base")
        base = type(llama()).from_pretrained(f"{folder}/base")
        model = bend(adapted(placement, base))
        model.save_pretrained(folder)
        with may_be_refused():
            again = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
        assert torch.equal(logits(again), logits(model))
        assert isinstance(PeftConfig.from_pretrained(folder), LSLoraConfig)


@operation(GROUP, "get_peft_model_state_dict, set_peft_model_state_dict")
def state_dicts(placement: str) -> None:
    model, again = bend(adapted(placement)), adapted(placement)
    with may_be_refused():
        found = set_peft_model_state_dict(again, get_peft_model_state_dict(model))
    assert not found.unexpected_keys
    assert torch.equal(logits(again), logits(model))


@operation(GROUP, "inject_adapter_in_model")
def inject(placement: str) -> None:
    torch.manual_seed(1)
    config = LSLoraConfig(placement=placement, r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with may_be_refused():
        model = inject_adapter_in_model(config, llama()).eval()
    assert sum(isinstance(m, LSLoraLayer) for m in model.modules()) == 4
    assert not torch.allclose(logits(model), logits(llama()))


@operation(GROUP, "transformers' add_adapter, save_pretrained, load_adapter")
def transformers_adapter(placement: str) -> None:
    model = llama()
    config = LSLoraConfig(placement=placement, r=2, target_modules=["q_proj"], init_lora_weights=False)
    with may_be_refused():
        model.add_adapter(config)
        bend(model)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = llama()
            again.load_adapter(folder)
    assert torch.equal(logits(again), logits(model.eval()))


def saved_other(placement: str, folder: str) -> Any:
    torch.manual_seed(5)
    model = bend(adapted(placement))
    for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


@operation(GROUP, "hotswap")
def hotswap(placement: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        swapped_in = saved_other(placement, folder)
        model = adapted(placement)
        with may_be_refused():
            hotswap_adapter(model, folder, adapter_name="default")
    assert torch.equal(logits(model), logits(swapped_in))


@operation(GROUP, "hotswap into a compiled model, without compiling again")
def compiled_hotswap(placement: str) -> None:
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder:
        swapped_in = saved_other(placement, folder)
        model = adapted(placement)
        with may_be_refused():
            prepare_model_for_compiled_hotswap(model, config=model.peft_config["default"])
            model = torch.compile(model, backend="aot_eager")
            logits(model)
            hotswap_adapter(model, folder, adapter_name="default")
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = logits(model)
    torch.testing.assert_close(found, logits(swapped_in), rtol=1e-4, atol=1e-4)


@operation(GROUP, "hotswap of an adapter with other knots")
def hotswap_of_other_knots(placement: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        adapted(placement, num_knots=9).save_pretrained(folder)
        with may_be_refused():
            hotswap_adapter(adapted(placement), folder, adapter_name="default")
    raise AssertionError("nine knots were swapped for five")


@operation(GROUP, "torch.compile in one graph")
def compile_in_one_graph(placement: str) -> None:
    torch._dynamo.reset()
    model = bend(adapted(placement))
    expected = logits(model)
    with may_be_refused():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        found = logits(compiled)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@operation(GROUP, "torch.compile, other scalings: compiled again for the second, not for the third")
def compiled_scalings(placement: str) -> None:
    """LoRA's count too: torch makes a number a variable when it changes."""
    torch._dynamo.reset()
    model = bend(adapted(placement))
    with may_be_refused():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        logits(compiled)
        with rescale_adapter_scale(model, 0.5):
            logits(compiled)
        with rescale_adapter_scale(model, 2.0):
            expected = logits(model)
            with torch._dynamo.config.patch(error_on_recompile=True):
                found = logits(compiled)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@operation(GROUP, "merge_and_unload")
def merge_and_unload(placement: str) -> None:
    model = bend(adapted(placement))
    expected = logits(model)
    with may_be_refused():
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


@operation(GROUP, "merge_adapter, unmerge_adapter")
def merge_adapter(placement: str) -> None:
    model = bend(adapted(placement))
    expected = logits(model)
    with may_be_refused():
        model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@operation(GROUP, "add_weighted_adapter")
def add_weighted_adapter(placement: str) -> None:
    with may_be_refused():
        with_two(placement).add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean", combination_type="cat")
    raise AssertionError("a weighted sum of splines was accepted")


@operation(GROUP, "convert_to_lora")
def conversion(placement: str) -> None:
    model = bend(adapted(placement))
    with may_be_refused():
        config, tensors = convert_to_lora(model, rank=16)
    assert isinstance(config, LoraConfig) and tensors


@operation(GROUP, "PeftMixedModel")
def mixed_model(placement: str) -> None:
    config = LSLoraConfig(placement=placement, target_modules=["q_proj"])
    with may_be_refused():
        PeftMixedModel(llama(), config, adapter_name="default")
    raise AssertionError("the mixed model would take the adapter for plain LoRA")


@operation(GROUP, "LoRA and LS-LoRA adapters in one PeftModel")
def beside_lora(placement: str) -> None:
    model = adapted(placement)
    with may_be_refused():
        model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))
    raise AssertionError("a LoRA adapter was added to a model of LS-LoRA adapters")


@operation(GROUP, "LoRA+ optimizer")
def loraplus(placement: str) -> None:
    model = adapted(placement)
    with may_be_refused():
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4.0)
    before = splines(model)[0].weight.clone()
    check_gradients(model)
    optimizer.step()
    assert not torch.equal(splines(model)[0].weight, before)


@operation(GROUP, "LoRA-FA optimizer")
def lorafa(placement: str) -> None:
    model = adapted(placement)
    with may_be_refused():
        optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=1e-2)
        check_gradients(model)
        optimizer.step()
