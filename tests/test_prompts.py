"""Token ids of rows and examples against those that TRL's trainer makes of the same examples."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from lslora.data import load_examples, load_rows
from lslora.lengths import fit_examples, position_limit, position_limit_of
from lslora.prompts import example_ids, prompt_ids, turn_end

WORDS = [
    "###",
    "Instruction:",
    "Input:",
    "Response:",
    "user",
    "assistant",
    "is",
    "rose",
    "red",
    "?",
    "true",
    "false",
    "the",
    "answer",
]
ROWS = [
    {"instruction": "is rose red ?", "input": "the rose", "output": "true", "answer": "true"},
    {"instruction": "is red rose ?", "output": "the answer is false", "answer": "false"},
]
TALK = [{"role": role, "content": "is rose red ?"} for role in ("user", "assistant", "user", "assistant")]


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")
    found.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    return found


def trained_ids(tokenizer, examples, folder, **settings):
    """What TRL trains on: token ids, and which of them it learns."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    args = SFTConfig(str(folder), use_cpu=True, bf16=False, report_to="none", **settings)
    dataset = Dataset.from_list([dict(example) for example in examples])
    made = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer).train_dataset
    return [(row["input_ids"], row.get("labels")) for row in made]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("content", "chat"),
    [(ROWS, False), (ROWS, True), ([{"messages": TALK}], False), ([{"text": "the rose is red"}], False)],
    ids=["instructions", "chat template", "messages", "text"],
)
def test_examples_have_the_tokens_that_trl_trains_on(tokenizer, tmp_path, content, chat):
    (tmp_path / "rows.json").write_text(json.dumps(content), encoding="utf-8")
    examples = load_examples(tmp_path / "rows.json", chat_template=chat)
    conversation = chat or "messages" in content[0]
    for example, (trained, _) in zip(examples, trained_ids(tokenizer, examples, tmp_path), strict=True):
        end = [] if conversation else [tokenizer.eos_token_id]  # a template ends the answer itself
        assert example_ids(tokenizer, example) + end == trained


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chat", [False, True])
def test_prompts_end_where_trl_begins_to_learn(tokenizer, tmp_path, chat):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    rows = load_rows(tmp_path / "rows.json")
    examples = load_examples(tmp_path / "rows.json", chat_template=chat)
    for row, (trained, labels) in zip(rows, trained_ids(tokenizer, examples, tmp_path), strict=True):
        prompt = prompt_ids(tokenizer, row, chat_template=chat)
        assert prompt == trained[: len(prompt)]
        assert labels == [-100] * len(prompt) + trained[len(prompt) :]
        asked = prompt_ids(tokenizer, row, row["output"], chat_template=chat)
        assert [*asked, tokenizer.eos_token_id] == trained


TEXTS = [{"text": "the rose is red"}, {"text": "red"}, {"text": "the rose is red <eos>"}]
LONG = [ROWS[0], {"instruction": "is rose red ? " * 4, "output": "true"}, ROWS[1]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss_on_prompt", [False, True])
@pytest.mark.parametrize(
    ("content", "chat"),
    [(LONG, False), (LONG, True), ([{"messages": TALK}, {"messages": TALK[:2]}], False), (TEXTS, False)],
    ids=["instructions", "chat template", "messages", "text"],
)
def test_what_fits_is_what_trl_keeps(tokenizer, tmp_path, content, chat, loss_on_prompt):
    (tmp_path / "rows.json").write_text(json.dumps(content), encoding="utf-8")
    examples = load_examples(tmp_path / "rows.json", chat_template=chat)
    whole = trained_ids(tokenizer, examples, tmp_path, max_length=None, completion_only_loss=not loss_on_prompt)
    begins = [next(i for i, label in enumerate(labels) if label != -100) for _, labels in whole]
    ends = [len(ids) for ids, _ in whole]
    limits = {max(begins), *(begin + 1 for begin in begins), max(ends) - 1, max(ends)}
    for max_length in limits - {0, 1}:  # nothing predicts the first token
        fit = fit_examples(tokenizer, examples, max_length, loss_on_prompt=loss_on_prompt)
        settings = {"max_length": max_length, "completion_only_loss": not loss_on_prompt}
        assert trained_ids(tokenizer, fit.kept, tmp_path, **settings) == [
            (ids[:max_length], labels[:max_length])
            for begin, (ids, labels) in zip(begins, whole, strict=True)
            if begin < max_length
        ]
        assert fit.longer == sum(end > max_length for end in ends)
        assert fit.kept == [example for i, example in enumerate(examples, start=1) if i not in fit.dropped]


def test_what_is_dropped_is_numbered(tokenizer):
    short, long = ({"prompt": "is " * count, "completion": "true"} for count in (3, 9))
    fit = fit_examples(tokenizer, [short, long, short], 5)
    assert str(fit) == (
        "1 of 3 examples have more than 5 tokens and are cut; 1 of all keep nothing to learn and are dropped: number 2"
    )
    assert str(fit_examples(tokenizer, [short], 4)) == "1 of 1 examples have more than 4 tokens and are cut"
    many = str(fit_examples(tokenizer, [short, *[long] * 12], 5))
    assert many.endswith("number 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 2 more")


@pytest.mark.parametrize("max_length", [9, 1, 0, -3])
def test_nothing_left_is_an_error(tokenizer, max_length):
    with pytest.raises(ValueError, match=f"at least one example must have .* more than {max_length} tokens"):
        fit_examples(tokenizer, [{"prompt": "is " * 9, "completion": "true"}], max_length)
    with pytest.raises(ValueError, match="at least one example must have something to learn"):
        fit_examples(tokenizer, [{"text": "red"}], min(max_length, 1), loss_on_prompt=True)


def test_a_conversation_that_the_template_refuses_is_named(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}x y"
    good = {"prompt": TALK[:1], "completion": TALK[1:2]}
    bad = {"prompt": [{"role": "system", "content": "a"}], "completion": TALK[1:2]}
    with pytest.raises(ValueError, match="example 2: the tokenizer's chat template refuses the messages: user first"):
        fit_examples(strict, [good, bad], 5)
    strict.chat_template = "{{ raise_exception('not today') }}"
    for ask in (lambda: prompt_ids(strict, ROWS[0], chat_template=True), lambda: turn_end(strict)):
        with pytest.raises(ValueError, match="the tokenizer's chat template refuses the messages: not today"):
            ask()


def test_a_tokenizer_must_have_what_ends_a_row(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    fit_examples(endless, [{"prompt": TALK[:1], "completion": TALK[1:2]}], 99)  # its template ends a conversation
    with pytest.raises(ValueError, match="example 1: the tokenizer must have an end-of-sequence token"):
        fit_examples(endless, [{"prompt": "is red", "completion": "true"}], 99)


OF_ALL = {"vocab_size": 40, "max_position_embeddings": 12}
GPT = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 40, "n_positions": 12}
BERT = OF_ALL | {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
LIMITED = {
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 4},
    "gpt_neo": OF_ALL | {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]},
    "opt": BERT | {"ffn_dim": 16, "word_embed_proj_dim": 16},
    "bert": BERT | {"is_decoder": True},
}
UNLIMITED = {
    "llama": BERT,
    "bloom": {"n_layer": 1, "n_head": 2, "hidden_size": 16, "vocab_size": 40},
    "mamba": {"num_hidden_layers": 1, "hidden_size": 16, "vocab_size": 40},
    "xglm": OF_ALL | {"d_model": 16, "num_layers": 1, "attention_heads": 2, "ffn_dim": 16},  # makes its table longer
    # with as many words and widths as positions
    "qwen2": BERT | {"vocab_size": 12, "hidden_size": 12, "intermediate_size": 12, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("kind", [*LIMITED, *UNLIMITED])
def test_the_limit_is_where_a_model_ends(kind, tmp_path):
    config = AutoConfig.for_model(kind, **(LIMITED | UNLIMITED)[kind])
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert position_limit(model) == position_limit_of(str(tmp_path)) == (12 if kind in LIMITED else None)
    tokens = torch.ones(1, 13, dtype=torch.int64)
    model(tokens[:, :12])
    if kind in LIMITED:
        with pytest.raises((IndexError, RuntimeError), match="out of range|out of bounds|must match"):
            model(tokens)
    else:
        model(tokens)
