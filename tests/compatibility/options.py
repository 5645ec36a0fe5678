"""Every option of `LoraConfig`: same outputs as plain LoRA with it, or a refusal at construction."""

from __future__ import annotations

from typing import Any

import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    KasaConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from transformers import GPT2Config, GPT2LMHeadModel

from lslora import LSLoraConfig

from .models import IDS, adapted, bend, check_gradients, check_like_lora, check_saving, llama, logits
from .registry import may_be_refused, operation


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=2, n_positions=32)).eval()


def tied_llama() -> Any:
    return llama(tie_word_embeddings=True)


ACCEPTED: dict[str, dict[str, Any]] = {
    "target_modules as a list": {"target_modules": ["q_proj", "up_proj"]},
    "target_modules as a regular expression": {"target_modules": r".*\.(v_proj|gate_proj)"},
    'target_modules="all-linear"': {"target_modules": "all-linear"},
    "target_modules left to the model": {"target_modules": None},
    "exclude_modules": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "layers_to_transform": {"layers_to_transform": [1]},
    "layers_to_transform, layers_pattern": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "rank_pattern": {"rank_pattern": {"down_proj": 4}},
    "alpha_pattern": {"alpha_pattern": {"down_proj": 32}},
    "use_rslora": {"use_rslora": True},
    "lora_dropout": {"lora_dropout": 0.1},
    'bias="all"': {"bias": "all"},
    'bias="lora_only"': {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "fan_in_fan_out": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 5]},
    "ensure_weight_tying": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
}
BASES = {"lora_bias": gpt2, "fan_in_fan_out": gpt2, "ensure_weight_tying": tied_llama}


def accepted(name: str, placement: str) -> None:
    base, settings = BASES.get(name, llama), ACCEPTED[name]
    with may_be_refused():
        adapted(placement, base(), **settings)
    check_like_lora(placement, base, **settings)


for name in ACCEPTED:
    operation("Options of LoraConfig", name)(lambda placement, name=name: accepted(name, placement))


def same_start_as_lora(init: Any, placement: str) -> None:
    """With B = 0 a fresh adapter leaves the base as it is; otherwise it is LoRA's."""
    with may_be_refused():
        ours = adapted(placement, init_lora_weights=init)
    torch.testing.assert_close(logits(ours), logits(adapted(None, init_lora_weights=init)), rtol=1e-4, atol=1e-4)


INITIALISATIONS = [True, False, "gaussian", "orthogonal"]
REFUSED_INITIALISATIONS = ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq", "mica"]
for init in INITIALISATIONS + REFUSED_INITIALISATIONS:
    operation("Options of LoraConfig", f"init_lora_weights={init!r}")(
        lambda placement, init=init: same_start_as_lora(init, placement)
    )


@operation("Options of LoraConfig", "init_lora_weights='eva'")
def eva(placement: str) -> None:
    settings: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "eva"}
    settings["eva_config"] = EvaConfig(rho=1.0)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    models = []
    for cls, more in ((LoraConfig, {}), (LSLoraConfig, {"placement": placement})):
        torch.manual_seed(1)
        model = get_peft_model(llama(), cls(**settings, **more))
        with may_be_refused():
            initialize_lora_eva_weights(model, [batch])
        models.append(model.eval())
    plain, ours = ({n: p for n, p in m.named_parameters() if "lora_A" in n} for m in models)
    for key, tensor in plain.items():
        assert torch.equal(ours[key], tensor)
    model = models[1]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    check_gradients(model)
    check_saving(bend(model))


REFUSED: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "use_qalora": {"use_qalora": True},
    "velora_config": {"velora_config": VeloraConfig()},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
    "monteclora_config": {"monteclora_config": MontecloraConfig()},
    "use_bdlora": {"use_bdlora": BdLoraConfig()},
    "arrow_config": {"arrow_config": ArrowConfig()},
    "kasa_config": {"kasa_config": KasaConfig()},
    "target_parameters": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "megatron_config": {"megatron_config": {"tensor_model_parallel_size": 1}},
    "corda_config": {"corda_config": CordaConfig()},
    "lora_ga_config": {"lora_ga_config": LoraGAConfig()},
    "loftq_config": {"loftq_config": {"loftq_bits": 4}},
    "eva_config without its initialisation": {"eva_config": EvaConfig()},
    "runtime_config.ephemeral_gpu_offload": {"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)},
}


def refused(name: str, placement: str) -> None:
    with may_be_refused():
        LSLoraConfig(placement=placement, **REFUSED[name])
    raise AssertionError(f"{name} was accepted, although nothing comes of it")


for name in REFUSED:
    operation("Options of LoraConfig", name)(lambda placement, name=name: refused(name, placement))
