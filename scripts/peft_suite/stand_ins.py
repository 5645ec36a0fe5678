"""Small random models under the hub's names that peft's tests ask for, laid out as the hub's cache, so that no hub is
needed: `python stand_ins.py CACHE`. Architectures are the named ones, sizes and weights are not."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

COMMIT = "0" * 40
VOCABULARY = 1024
SMALL = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 2}
LLAMA = {**SMALL, "num_key_value_heads": 2}
OPT = {
    **{"hidden_size": 16, "num_attention_heads": 4, "ffn_dim": 32, "num_hidden_layers": 2, "word_embed_proj_dim": 16},
    **{"max_position_embeddings": 128, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2},
}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART = {
    **{"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4, "max_position_embeddings": 100},
}
DEBERTA = {**SMALL, "relative_attention": True, "position_biased_input": False, "pos_att_type": ["c2p", "p2c"]}

# Hub name → the model's class, its configuration's settings.
MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", OPT),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", OPT),
    "facebook/opt-125m": ("OPTForCausalLM", OPT),
    "facebook/opt-350m": ("OPTForCausalLM", OPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT2),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT2),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT2),
    "openai-community/gpt2": ("GPT2LMHeadModel", GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**GPT2, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        {"hidden_size": 32, "n_head": 4, "n_layer": 2},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", LLAMA),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", LLAMA),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", LLAMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", LLAMA),
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5": ("Qwen2ForCausalLM", LLAMA),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", {**LLAMA, "head_dim": 8}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        {**LLAMA, "head_dim": 8, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "hf-internal-testing/Mixtral-tiny": ("MixtralForCausalLM", {**LLAMA, "num_local_experts": 4}),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", BART),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", SMALL),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", SMALL),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", SMALL),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        SMALL,
    ),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", DEBERTA),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", LLAMA),
}


def main(cache: Path) -> None:
    tokenizer = byte_tokenizer()
    for name, (model_class, settings) in MODELS.items():
        repository = cache / "hub" / f"models--{name.replace('/', '--')}"
        folder = repository / "snapshots" / COMMIT
        if folder.exists():
            continue
        torch.manual_seed(0)
        cls = getattr(transformers, model_class)
        config = cls.config_class(
            **{"vocab_size": VOCABULARY, "pad_token_id": 0, "initializer_range": 0.1, **settings}
        )
        cls(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, after `<pad>`, `<unk>`, `<s>`, `</s>`."""
    tokens = ["<pad>", "<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
