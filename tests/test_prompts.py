"""Token ids of rows and examples against those that TRL's trainer makes of the same examples."""

import json

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from lslora.data import load_examples, load_rows
from lslora.prompts import example_ids, prompt_ids

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


def trained_ids(tokenizer, examples, folder):
    """What TRL trains on: token ids, and which of them it learns."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    args = SFTConfig(str(folder), use_cpu=True, bf16=False, report_to="none")
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
