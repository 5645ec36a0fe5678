"""A small random Llama with a word tokenizer, as a folder, and rows for it."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROWS = [
    {
        "instruction": f"Please answer the following question with true or false, question: is {word} red?\n\n"
        "Answer format: true/false",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
        "task": "boolq",
    }
    for word, answer in [("rose", "true"), ("grass", "false"), ("blood", "true"), ("snow", "false")] * 6
]


def make_tiny(folder):
    """Write `model` and `train.jsonl` into the folder."""
    words = dict.fromkeys(word for row in ROWS for word in " ".join(row.values()).replace("/", " / ").split())
    words |= dict.fromkeys(["###", "Instruction:", "Response:"])
    vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("/", behavior="isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>", model_max_length=256
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=0, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
