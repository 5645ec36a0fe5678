"""Likelihoods and generated answers against plain full-sequence computations, on tiny models with random weights."""

import copy
import importlib.util
import json
import re
import resource
import sys
import tracemalloc
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.stats import chisquare
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
)

from lslora import base_model
from lslora.answers import option_completion, options_of
from lslora.data import to_messages, to_prompt_completion
from lslora.evaluation import WINDOW, check_rows, evaluate, generate_answers, in_row_order, predict, with_scorers
from lslora.likelihood import score_options
from lslora.partial_results import PartialResults
from lslora.prompts import prompt_ids, turn_end

QUESTIONS = (
    "is the sky blue?",
    "which of them has the most volume, and which of them would float on water if there were any?",
    "who?",
    "do squirrels sleep for long periods of time during the winter months?",
)


def choice_row(number, options=("true", "false"), ending=""):
    answer = options[number % len(options)]
    return {
        "instruction": f"{QUESTIONS[number % 4]}\n\nAnswer format: {'/'.join(options)}",
        "input": "some further context" if number % 3 == 0 else "",
        "output": f"the correct answer is {answer}{ending}",
        "answer": answer,
        "task": f"task{number % 2}",
    }


def number_row(number):
    return {
        "instruction": QUESTIONS[number % 4] + " How many?",
        "input": "",
        "output": f"The answer is {number}.",
        "answer": str(number),
        "task": "count",
    }


FOUR = ("answer1", "answer2", "answer3", "answer4")
UNEQUAL = ("yes", "no", "certainly")
ONE_TOKEN_LEFT = [choice_row(i, FOUR) for i in range(5)]
MORE_LEFT = [choice_row(i, UNEQUAL, ", indeed") for i in range(5)]
MIXED = [choice_row(0), choice_row(1, FOUR, " of them"), choice_row(2, UNEQUAL), choice_row(3, FOUR), choice_row(6)]


@pytest.fixture(scope="module")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = ["".join(to_prompt_completion(row).values()) for row in ONE_TOKEN_LEFT + MORE_LEFT]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    begin = bpe.token_to_id("<s>")
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")


SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": 400}
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, intermediate_size=48, pad_token_id=0)),
    "sliding window": lambda: MistralForCausalLM(
        MistralConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, sliding_window=8)
    ),
    "learnt positions": lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=400)),
}


class WithoutLogitsToKeep(LlamaForCausalLM):
    """An architecture that always makes all logits."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, use_cache=use_cache)


class WithNewCacheName(LlamaForCausalLM):
    """The cache's name in transformers 5.24 and later, whatever version this is."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=None):
        output = super().forward(input_ids, attention_mask, position_ids, cache, use_cache=use_cache)
        output.cache = cache if cache is not None else output.past_key_values
        return output


class WithoutCache(LlamaForCausalLM):
    """An architecture that reads whatever it gets from the start."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        return super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache)


def make_model(name="llama", dtype=torch.float64):
    torch.manual_seed(0)
    model = ARCHITECTURES[name]()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # weights large enough that the predictions differ from token to token
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


@torch.no_grad()
def plain_scores(model, tokenizer, row):
    """Every option on its own: the whole sequence at once, no padding, no cache."""
    prompt = to_prompt_completion(row)["prompt"]
    start = len(tokenizer(prompt)["input_ids"])
    scores = {}
    for option in options_of(row):
        ids = tokenizer(prompt + option_completion(row, option))["input_ids"]
        assert ids[:start] == tokenizer(prompt)["input_ids"]
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        scores[option] = sum(
            (logits[j - 1, ids[j]] - logits[j - 1].logsumexp(0)).item() for j in range(start, len(ids))
        )
    return scores


def assert_scores_close(found, expected, rel=1e-9):
    assert [list(scores) for scores in found] == [list(scores) for scores in expected]
    for scores, reference in zip(found, expected, strict=True):
        assert scores == pytest.approx(reference, rel=rel)


class Calls(list):
    """The keyword arguments of every forward call of a model."""

    def __init__(self, model):
        model.register_forward_pre_hook(lambda _, args, kwargs: self.append(kwargs), with_kwargs=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [ONE_TOKEN_LEFT, MORE_LEFT, MIXED], ids=["one token left", "more left", "mixed"])
def test_likelihoods_equal_those_of_the_whole_sequences(tokenizer, architecture, rows):
    model = make_model(architecture)
    found = score_options(model, tokenizer, rows)
    assert_scores_close(found, [plain_scores(model, tokenizer, row) for row in rows])


CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def test_with_a_chat_template_the_prompt_is_the_templates(tokenizer):
    """As TRL trains: the template's text for the question, the answer behind it, no special token twice."""
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHAT
    row, model = MORE_LEFT[0], make_model()
    prompt = f"<user>\n{row['instruction']}\n\n{row['input']}</s><assistant>\n"
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    for option, found in score_options(model, chatty, [row], chat_template=True)[0].items():
        text = prompt + option_completion(row, option)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        expected = log_probs.gather(1, ids[0, 1:, None])[start - 1 :].sum().item()
        assert found == pytest.approx(expected, rel=1e-9)

    trained = chatty.apply_chat_template([*to_messages(row)["prompt"], *to_messages(row)["completion"]])["input_ids"]
    asked = prompt_ids(chatty, row, row["output"], chat_template=True)
    assert trained[: len(asked)] == asked and tokenizer.decode(trained[len(asked) :]) == "</s>"
    with_template = evaluate(model, chatty, [row], scorer="generate", max_new_tokens=9, chat_template=True)
    without = evaluate(model, chatty, [row], scorer="generate", max_new_tokens=9)
    assert with_template[0]["text"] != without[0]["text"]
    with pytest.raises(ValueError, match="must have a chat template"):
        evaluate(model, tokenizer, [row], chat_template=True)


def test_log_probabilities_of_a_half_precision_model_are_not_rounded_to_its_dtype(tokenizer):
    model, logits = make_model(dtype=torch.bfloat16), []
    model.register_forward_hook(lambda _, args, output: logits.append(output.logits[:, -1]))
    scores = score_options(model, tokenizer, ONE_TOKEN_LEFT)
    last = {option: tokenizer(option)["input_ids"][-1] for option in FOUR}
    for row_logits, row_scores in zip(logits[0].double(), scores, strict=True):
        # Where one token is left, two options differ by the difference of their logits.
        differences = {option: (row_logits[last[option]] - row_logits[last["answer1"]]).item() for option in FOUR}
        found = {option: row_scores[option] - row_scores["answer1"] for option in FOUR}
        assert found == pytest.approx(differences, abs=1e-4)


def test_architectures_that_lack_an_argument(tokenizer):
    model = make_model()
    expected = score_options(model, tokenizer, MORE_LEFT)
    model.__class__ = WithoutLogitsToKeep
    assert_scores_close(score_options(model, tokenizer, MORE_LEFT), expected)
    torch.manual_seed(0)  # Bloom takes no position_ids; row by row, as in float64 it turns padding into NaN
    bloom = BloomForCausalLM(BloomConfig(n_layer=2, n_head=4, hidden_size=32, vocab_size=400)).double().eval()
    for row in MIXED:
        assert_scores_close(score_options(bloom, tokenizer, [row]), [plain_scores(bloom, tokenizer, row)])


def test_the_cache_is_passed_under_the_name_that_the_model_has_for_it(tokenizer):
    model = make_model()
    expected = [plain_scores(model, tokenizer, row) for row in MIXED]
    model.__class__ = WithNewCacheName
    assert_scores_close(score_options(model, tokenizer, MIXED), expected)


def test_a_state_space_model_goes_on_from_its_state(tokenizer):
    sizes = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8}
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(Mamba2Config(hidden_size=32, num_hidden_layers=2, vocab_size=400, **sizes)).eval()
    expected = [plain_scores(model, tokenizer, row) for row in MIXED]
    assert_scores_close(score_options(model, tokenizer, MIXED), expected, rel=1e-6)


def test_a_model_that_takes_no_cache_is_not_scored(tokenizer):
    model = make_model()
    model.__class__ = WithoutCache
    with pytest.raises(
        ValueError, match="forward must take one of .*'past_key_values'.*, got one that takes .*'input_"
    ):
        score_options(model, tokenizer, MIXED)


def test_a_model_that_computes_no_numbers_is_not_scored(tokenizer):
    model = make_model()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"log-likelihoods must be finite, got \[nan, nan"):
        score_options(model, tokenizer, MIXED)


@pytest.mark.parametrize(
    ("rows", "passes"), [(ONE_TOKEN_LEFT, 1), (MORE_LEFT, 2)], ids=["one token left", "more left"]
)
def test_the_shared_tokens_pass_once_and_few_logits_are_made(tokenizer, rows, passes):
    model = make_model()
    calls = Calls(model)
    score_options(model, tokenizer, rows)
    assert len(calls) == passes
    assert calls[0]["input_ids"].shape[0] == len(rows)
    completion = len(tokenizer("the correct answer is answer")["input_ids"]) - 1
    assert calls[0]["logits_to_keep"] <= completion + 1
    if passes == 2:
        assert calls[1]["input_ids"].shape[0] == sum(len(options_of(row)) for row in rows)
        assert calls[1]["input_ids"].shape[1] < calls[0]["logits_to_keep"] + 8


def test_a_token_that_the_tokenizer_puts_at_the_end_does_not_count(tokenizer):
    model = make_model()
    ending = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), bos_token="<s>", eos_token="</s>"
    )
    ids = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ids)
    assert ending("who?")["input_ids"][-1] == tokenizer.eos_token_id
    assert score_options(model, ending, MIXED) == score_options(model, tokenizer, MIXED)
    texts = generate_answers(model, tokenizer, MIXED, max_new_tokens=5)
    assert generate_answers(model, ending, MIXED, max_new_tokens=5) == texts


def test_options_of_which_one_begins_with_another_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"no option's tokens may begin with all those of another.*'a', 'a-b', 'c'"):
        score_options(make_model(), tokenizer, [choice_row(0, ("a", "a-b", "c"))])


def test_likelihood_of_a_row_without_options_is_refused(tokenizer):
    with pytest.raises(ValueError, match="must end in 'Answer format"):
        score_options(make_model(), tokenizer, [number_row(1)])


@torch.no_grad()
def greedy_ids(model, tokenizer, row, max_new_tokens, end=None):
    """The most likely token again and again, every time from the whole sequence."""
    prompt = ids = tokenizer(to_prompt_completion(row)["prompt"])["input_ids"]
    while len(ids) - len(prompt) < max_new_tokens and (ids is prompt or ids[-1] != end):
        ids = [*ids, model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()]
    return ids[len(prompt) :]


def plain_greedy(model, tokenizer, row, max_new_tokens, end=None):
    return tokenizer.decode(greedy_ids(model, tokenizer, row, max_new_tokens, end), skip_special_tokens=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_is_greedy_and_unmoved_by_padding(tokenizer, architecture):
    model = make_model(architecture)
    found = generate_answers(model, tokenizer, MIXED, max_new_tokens=6)
    assert found == [plain_greedy(model, tokenizer, row, 6, tokenizer.eos_token_id) for row in MIXED]
    assert len(set(found)) > 1


def test_generation_ignores_the_models_own_settings(tokenizer):
    model = make_model()
    expected = generate_answers(model, tokenizer, MIXED, max_new_tokens=6)
    stored = model.generation_config
    stored.do_sample, stored.temperature, stored.repetition_penalty, stored.no_repeat_ngram_size = True, 9.0, 5.0, 1
    assert generate_answers(model, tokenizer, MIXED, max_new_tokens=6) == expected


def test_generation_ends_where_the_models_positions_do(tokenizer):
    longest = max(len(prompt_ids(tokenizer, row)) for row in MIXED[:2])
    config = GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=400, n_positions=longest + 3)
    model = GPT2LMHeadModel(config).eval()
    model.generation_config.eos_token_id = None
    found = generate_answers(model, tokenizer, MIXED[:2], max_new_tokens=99)
    assert found == [plain_greedy(model, tokenizer, row, 3) for row in MIXED[:2]]
    model.config.n_positions = longest
    model.transformer.wpe = torch.nn.Embedding(longest, 32)
    with pytest.raises(ValueError, match=f"must have fewer than the model's {longest} tokens, got {longest}"):
        generate_answers(model, tokenizer, MIXED[:2], max_new_tokens=1)


@pytest.mark.parametrize("row", [MIXED[0], number_row(0)], ids=["likelihood", "generate"])
def test_rows_that_a_model_has_no_positions_for_are_told(tokenizer, row):
    whole = len(prompt_ids(tokenizer, row)) + 1
    if options_of(row):
        whole = max(len(prompt_ids(tokenizer, row, option_completion(row, option))) for option in options_of(row))
    check_rows(tokenizer, [row], positions=whole)
    with pytest.raises(ValueError, match=f"row with index 0: .* at most the model's {whole - 1} tokens, got {whole}"):
        check_rows(tokenizer, [row], positions=whole - 1)


def test_generation_ends_with_the_models_or_the_tokenizers_end_token(tokenizer):
    model = make_model()
    (text,) = generate_answers(model, tokenizer, MIXED[:1], max_new_tokens=8)
    end = greedy_ids(model, tokenizer, MIXED[0], 8)[3]
    expected = plain_greedy(model, tokenizer, MIXED[0], 8, end)
    assert expected != text
    model.generation_config.eos_token_id = [end]
    assert generate_answers(model, tokenizer, MIXED[:1], max_new_tokens=8) == [expected]


TURNS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ end }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def chatting(tokenizer, end):
    """The tokenizer with turns that end in `end`."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = TURNS.replace("{{ end }}", end)
    return tokenizer


@pytest.mark.parametrize("end", ["<|end|>", "\n<|end|></s>", "</s>"])
def test_the_token_that_ends_a_turn_is_found_in_the_template(tokenizer, end):
    tokenizer = chatting(tokenizer, end)
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>" if "|" in end else "</s>")


def test_a_template_may_end_turns_in_plain_words(tokenizer):
    assert turn_end(chatting(tokenizer, " over")) is None


def test_generation_with_a_template_ends_with_the_turn(tokenizer):
    model, tokenizer = make_model(), chatting(tokenizer, "<|end|>")
    model.resize_token_embeddings(len(tokenizer))
    ask = {"max_new_tokens": 8, "chat_template": True}
    prompt = torch.tensor([prompt_ids(tokenizer, MIXED[0], chat_template=True)])
    unended = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
    )
    ids = unended[0, prompt.shape[1] :].tolist()
    swapped = [tokenizer.convert_tokens_to_ids("<|end|>"), ids[3]]
    with torch.no_grad():  # now the model says <|end|> where it said that
        model.lm_head.weight[swapped] = model.lm_head.weight[swapped[::-1]]
    expected = tokenizer.decode(ids[: ids.index(ids[3])], skip_special_tokens=True)
    assert generate_answers(model, tokenizer, MIXED[:1], **ask) == [expected]
    assert expected


ALL_ROWS = [row for pair in zip(MIXED, map(number_row, range(5)), strict=True) for row in pair]


@pytest.mark.parametrize("scorer", ["auto", "generate"])
def test_batch_size_does_not_matter(tokenizer, scorer):
    model = make_model()
    one, four = (
        evaluate(model, tokenizer, ALL_ROWS, scorer=scorer, batch_size=size, max_new_tokens=5) for size in (1, 4)
    )
    assert [item["index"] for item in one] == list(range(len(ALL_ROWS)))
    for first, second in zip(one, four, strict=True):
        assert first.pop("log_likelihoods", {}) == pytest.approx(second.pop("log_likelihoods", {}), rel=1e-9)
        assert first == second


def test_predictions_name_their_row_and_the_likeliest_option(tokenizer):
    model = make_model()
    for item, row in zip(evaluate(model, tokenizer, ALL_ROWS, max_new_tokens=3), ALL_ROWS, strict=True):
        assert (item["task"], item["answer"]) == (row["task"], row["answer"])
        assert ("text" in item) == (options_of(row) is None)
        if options_of(row):
            scores = plain_scores(model, tokenizer, row)
            assert item["prediction"] == max(scores, key=scores.get)
            assert item["correct"] == (item["prediction"] == row["answer"])


@pytest.mark.parametrize("cut", [0, 1, 4, 7, 10])
def test_taken_up_again_it_computes_only_what_is_missing_and_the_same_numbers(tokenizer, cut):
    model = make_model(dtype=torch.float32)
    settings = {"batch_size": 3, "max_new_tokens": 3}
    written = list(predict(model, tokenizer, ALL_ROWS, **settings))
    assert list(in_row_order(written, 3)) == evaluate(model, tokenizer, ALL_ROWS, **settings)
    calls = Calls(model)
    assert list(predict(model, tokenizer, ALL_ROWS, **settings, known=iter(written[:cut]))) == written[cut:]
    assert bool(calls) == (cut < 10)


def test_known_predictions_of_another_call_are_refused(tokenizer):
    model = make_model()
    written = list(predict(model, tokenizer, ALL_ROWS, batch_size=3, max_new_tokens=1))
    first, last = [item["index"] for item in written[:3]], [item["index"] for item in written[:-4:-1]]
    with pytest.raises(ValueError, match=re.escape(f"known predictions must be of rows {first} next, got {last}")):
        list(predict(model, tokenizer, ALL_ROWS, batch_size=3, max_new_tokens=1, known=written[::-1]))


def test_more_rows_than_a_window_of_batches(tokenizer, monkeypatch):
    """Windows are for memory: with small ones every row gets the same answer, and few rows are held at once."""
    model = make_model()
    whole = evaluate(model, tokenizer, ALL_ROWS, batch_size=2, max_new_tokens=3)
    monkeypatch.setattr("lslora.evaluation.WINDOW", 2)
    alive, most = 0, 0

    class Counted(dict):
        def __init__(self, row):
            nonlocal alive, most
            super().__init__(row)
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    class Rows:
        def __len__(self):
            return 10 * len(ALL_ROWS)

        def __iter__(self):
            return (Counted(row) for _ in range(10) for row in ALL_ROWS)

    predictions = list(predict(model, tokenizer, Rows(), batch_size=2, max_new_tokens=3))
    ordered = list(in_row_order(predictions, 2))
    assert [item["index"] for item in ordered] == list(range(100))
    for place, item in enumerate(ordered):
        expected = whole[place % 10] | {"index": place}
        assert item.pop("log_likelihoods", {}) == pytest.approx(expected.pop("log_likelihoods", {}), rel=1e-9)
        assert item == expected
    assert most <= 2 * 2 * 2 < WINDOW  # the window and what of the one before a batch still holds


def test_modes_and_tokenizer_are_left_as_they_were(tokenizer):
    model = make_model().train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append(any(m.training for m in module.modules())))
    side = tokenizer.padding_side
    evaluate(model, tokenizer, ALL_ROWS[:2], max_new_tokens=2)
    score_options(model, tokenizer, ALL_ROWS[:1])
    generate_answers(model, tokenizer, ALL_ROWS[:1], max_new_tokens=2)
    assert not any(seen)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, ALL_ROWS, on_prediction=interrupt)
    assert [module.training for module in model.modules()] == modes
    assert tokenizer.padding_side == side


def interrupt(*_):
    raise KeyboardInterrupt


class Killed(BaseException):
    """An end that nothing can catch."""


def kill(*_):
    raise Killed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"scorer": "best"}, "scorer must be one of"),
        ({"scorer": "likelihood"}, "row with index 1: the likelihood needs"),
    ],
)
def test_bad_arguments_are_refused(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(make_model(), tokenizer, ALL_ROWS, **arguments)


def test_with_scorers():
    kinds = ["likelihood", "generate"]
    assert list(with_scorers(ALL_ROWS[:2])) == list(zip(ALL_ROWS[:2], kinds, strict=True))


def with_adapter(model):
    torch.manual_seed(1)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return tuned.eval()


def test_adapter_and_base_are_told_apart(tokenizer):
    base = score_options(make_model(), tokenizer, MIXED)
    tuned = with_adapter(make_model())
    found = score_options(tuned, tokenizer, MIXED)
    assert_scores_close(found, [plain_scores(tuned, tokenizer, row) for row in MIXED])
    assert found[0] != pytest.approx(base[0], rel=1e-3)
    with tuned.disable_adapter():
        assert_scores_close(score_options(tuned, tokenizer, MIXED), base)


# eval_lslora.py


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[1] / "eval_lslora.py"
    spec = importlib.util.spec_from_file_location("eval_lslora", path)
    sys.modules["eval_lslora"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["eval_lslora"]


@pytest.fixture
def arguments(tmp_path, tokenizer):
    model = make_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    tuned = with_adapter(model)
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "adapter")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ALL_ROWS), encoding="utf-8")
    return {
        "--adapter": tmp_path / "adapter",
        "--dataset": data,
        "--output": tmp_path / "results" / "out.json",
        "--batch_size": 3,
        "--max_new_tokens": 3,
    }


def command(arguments, *flags):
    return [*(str(part) for pair in arguments.items() for part in pair), *flags]


def partial(arguments):
    return Path(f"{arguments['--output']}.partial.jsonl")


def assert_same_predictions(found, expected):
    """Equal but for the rounding of fp32, which differs between two loads of the same model."""
    for one, other in zip(found, expected, strict=True):
        one, other = dict(one), dict(other)
        assert one.pop("log_likelihoods", {}) == pytest.approx(other.pop("log_likelihoods", {}), rel=1e-5)
        assert one == other


def test_script_measures_adapter_and_base_and_compares_them(script, arguments, tokenizer, capsys):
    base = make_model(dtype=torch.float32)
    rows = []
    for row, scores in zip(MIXED, score_options(base, tokenizer, MIXED), strict=True):
        best = max(scores, key=scores.get)
        rows.append(row | {"answer": best, "output": option_completion(row, best)})  # the base is always right
    arguments["--dataset"].write_text(json.dumps(rows), encoding="utf-8")

    assert script.main(command(arguments, "--base")) == 0
    results = json.loads(arguments["--output"].read_text(encoding="utf-8"))
    assert not partial(arguments).exists()
    assert_same_predictions(results["base"]["predictions"], evaluate(base, tokenizer, rows, batch_size=3))
    assert results["base"]["summary"]["micro"]["accuracy"] == 1
    tuned = PeftModel.from_pretrained(base, arguments["--adapter"])
    assert_same_predictions(results["predictions"], evaluate(tuned, tokenizer, rows, batch_size=3))
    accuracy = results["summary"]["micro"]["accuracy"]
    assert accuracy == sum(item["correct"] for item in results["predictions"]) / 5 < 1
    assert results["comparison"]["micro"]["difference"] == pytest.approx(accuracy - 1)
    printed = capsys.readouterr().out
    assert f"{100 * accuracy:.2f} [" in printed
    assert f"McNemar p = {results['comparison']['mcnemar_p']:.4g}" in printed


def test_script_asks_with_the_chat_template(script, arguments, tokenizer, capsys):
    assert script.main(command(arguments, "--chat_template")) == 2
    assert "--chat_template needs a tokenizer that has one" in capsys.readouterr().err
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHAT
    chatty.save_pretrained(arguments["--adapter"].parent / "base")
    assert script.main(command(arguments, "--chat_template", "--quiet")) == 0
    assert capsys.readouterr().out == ""
    results = json.loads(arguments["--output"].read_text(encoding="utf-8"))
    tuned = PeftModel.from_pretrained(make_model(dtype=torch.float32), arguments["--adapter"])
    expected = evaluate(tuned, chatty, ALL_ROWS, batch_size=3, max_new_tokens=3, chat_template=True)
    assert_same_predictions(results["predictions"], expected)
    assert expected != evaluate(tuned, chatty, ALL_ROWS, batch_size=3, max_new_tokens=3)


def test_script_measures_a_base_alone(script, arguments):
    model_name = arguments.pop("--adapter").parent / "base"
    assert script.main(command(arguments | {"--model_name": model_name})) == 0
    results = json.loads(arguments["--output"].read_text(encoding="utf-8"))
    assert results["settings"]["adapter"] is None
    assert "base" not in results


@pytest.fixture
def interrupted(script, arguments, monkeypatch):
    """Run the script, killed after some lines and perhaps within the next; the lines written."""

    def run(lines, torn=False):
        write, written = PartialResults.write, []

        def write_or_interrupt(results, value):
            if len(written) == lines:
                results.file.write(b'{"side": "adap' * torn)
                raise Killed
            write(results, value)
            written.append(value)
            assert json.loads(partial(arguments).read_bytes().splitlines()[-1]) == value

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(PartialResults, "write", write_or_interrupt)
            patch.setattr(script, "write_json_whole", kill)
            script.main(command(arguments, "--base"))
        assert not arguments["--output"].exists()
        return written

    return run


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("cuts", [(0,), (1,), (6, 1), (14, 3, 2), (21, 0)])
def test_script_goes_on_where_it_was_interrupted(script, arguments, interrupted, cuts, torn):
    assert script.main(command(arguments, "--base")) == 0
    expected = json.loads(arguments["--output"].read_text(encoding="utf-8"))
    arguments["--output"].unlink()
    written = [line for cut in cuts for line in interrupted(cut, torn)]
    if len(written) > 1:  # the settings alone are nothing to go on from
        assert [json.loads(line) for line in partial(arguments).read_bytes().split(b"\n")[:-1]] == written
    assert script.main(command(arguments, "--base")) == 0
    found = json.loads(arguments["--output"].read_text(encoding="utf-8"))
    for one, other in ((found, expected), (found["base"], expected["base"])):
        assert_same_predictions(one.pop("predictions"), other.pop("predictions"))
    assert found == expected
    assert not partial(arguments).exists()


@pytest.mark.parametrize("within", ["partial results", "results"])
def test_script_tells_that_nothing_more_can_be_written_and_goes_on_later(script, arguments, capsys, within):
    """A limit on the size of files ends a write as a full disk does."""
    assert script.main(command(arguments)) == 0
    whole = arguments["--output"].stat().st_size
    expected = json.loads(arguments["--output"].read_text(encoding="utf-8"))
    arguments["--output"].unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    lines = [expected["settings"], *({"side": "adapter", "prediction": item} for item in expected["predictions"])]
    part = sum(len(json.dumps(line, ensure_ascii=False).encode()) + 1 for line in lines)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (part // 2 if within == "partial results" else (part + whole) // 2, hard)
    )
    try:
        assert script.main(command(arguments)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{arguments['--output']} could not be written: [Errno 27]" in capsys.readouterr().err
    assert not arguments["--output"].exists()
    assert script.main(command(arguments)) == 0
    found = json.loads(arguments["--output"].read_text(encoding="utf-8"))
    assert_same_predictions(found.pop("predictions"), expected.pop("predictions"))
    assert found == expected


def test_script_computes_nothing_anew_when_all_is_there(script, arguments, interrupted, monkeypatch):
    assert len(interrupted(21)) == 21  # the settings, and ten rows with and without the adapter
    monkeypatch.setattr(PartialResults, "write", interrupt)
    assert script.main(command(arguments, "--base")) == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"--batch_size": 4}, "batch_size was 3 and is 4"),
        ({"--limit": 4}, "limit was None and is 4"),
        ("adapter", "adapter_sha256 was"),
        ("base", "base_files was {'config.json'"),
        ("rows", "datasets was"),
    ],
)
def test_script_does_not_mix_settings(script, arguments, interrupted, capsys, change, named):
    interrupted(2)  # the settings and a row
    capsys.readouterr()
    if change == "adapter":
        weights = arguments["--adapter"] / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    elif change == "base":  # trained again, say
        make_model(dtype=torch.float32).save_pretrained(arguments["--adapter"].parent / "base")
    elif change == "rows":
        arguments["--dataset"].write_text(json.dumps(ALL_ROWS[0]), encoding="utf-8")
    else:
        arguments |= change
    before = partial(arguments).read_bytes()
    assert script.main(command(arguments, "--base")) == 2
    message = capsys.readouterr().err
    assert named in message
    assert f"delete {partial(arguments)} or choose another --output" in message
    assert partial(arguments).read_bytes() == before


def test_script_is_not_held_up_by_an_evaluation_that_answered_nothing(script, arguments, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(script, "answer", interrupt)
        assert script.main(command(arguments)) == 130
    assert not partial(arguments).exists()
    settings = script.settings_of(script.parse_arguments(command(arguments | {"--limit": 3})))
    partial(arguments).write_text(json.dumps(settings) + "\n", encoding="utf-8")  # left by a kill
    assert script.main(command(arguments)) == 0


def test_script_writes_no_output_that_another_is_writing(script, arguments, monkeypatch, capsys):
    answer = script.answer

    def answer_and_start_again(*given):
        assert script.main(command(arguments)) == 2
        assert "another evaluation is writing" in capsys.readouterr().err
        answer(*given)

    monkeypatch.setattr(script, "answer", answer_and_start_again)
    assert script.main(command(arguments)) == 0
    assert [path.name for path in arguments["--output"].parent.iterdir()] == ["out.json"]


@pytest.mark.parametrize("limit", [None, 3])
def test_script_knows_where_a_row_stands(script, tmp_path, limit):
    paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for path in paths:
        rows = [number_row(i) | {"task": f"{path.name}: row {i + 1}"} for i in range(7)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    questions = script.Questions(paths, limit, seed=3)
    for index, row in enumerate(questions):
        assert questions.place(index) == f"{tmp_path}/{row['task']}"
    with pytest.raises(IndexError, match=f"there are {len(questions)} rows"):
        questions.place(len(questions))


def test_rows_without_a_task_are_called_after_their_file(script):
    paths = [Path(name) for name in ("a/quiz.json", "b/quiz.json", "a/boolq.json", "arc/test.json", "piqa/test.json")]
    assert script.task_names(paths) == ["a/quiz", "b/quiz", "boolq", "arc", "piqa"]
    assert script.task_names([Path("a/arc/test.json"), Path("b/arc/dev.json")]) == ["arc", "dev"]


def test_script_refuses_an_output_that_is_a_folder(script, arguments, capsys):
    arguments["--output"].mkdir(parents=True)
    assert script.main(command(arguments)) == 2
    assert "--output must be a file, got the folder" in capsys.readouterr().err


def test_script_does_not_write_over_its_questions(script, arguments, capsys):
    before = arguments["--dataset"].read_bytes()
    arguments["--output"] = arguments["--dataset"]
    assert script.main(command(arguments)) == 2
    assert "--output must be a new file or earlier results, or it would be lost, got" in capsys.readouterr().err
    assert arguments["--dataset"].read_bytes() == before
    config = arguments["--output"] = arguments["--adapter"] / "adapter_config.json"
    before = config.read_bytes()
    assert script.main(command(arguments)) == 2
    assert config.read_bytes() == before


def test_script_writes_over_earlier_results(script, arguments):
    assert script.main(command(arguments | {"--limit": 2})) == 0
    assert script.main(command(arguments | {"--limit": 3})) == 0
    assert len(json.loads(arguments["--output"].read_text(encoding="utf-8"))["predictions"]) == 3


def test_script_says_which_adapter_does_not_fit_which_base(script, arguments, tokenizer, tmp_path, capsys):
    small = LlamaForCausalLM(LlamaConfig(**SIZES | {"hidden_size": 16}, intermediate_size=8))
    small.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "plain")
    arguments |= {"--adapter": tmp_path / "plain", "--model_name": tmp_path / "small"}
    assert script.main(command(arguments)) == 2
    assert f"{tmp_path / 'plain'} does not fit the base model" in capsys.readouterr().err
    assert not partial(arguments).exists()


def test_script_tells_of_a_base_that_cannot_be_read_or_fetched(script, arguments, tmp_path, capsys, monkeypatch):
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert script.main(command(arguments)) == 2
    assert f"the base model {tmp_path / 'base'} cannot be read: " in capsys.readouterr().err

    def unreachable(name):
        raise RuntimeError("the embedded model cannot be fetched")

    monkeypatch.setattr(base_model, "resolve_model_name", unreachable)
    assert script.main(command(arguments)) == 2
    assert f"the base model {tmp_path / 'base'}: the embedded model cannot be fetched\n" in capsys.readouterr().err
    assert not partial(arguments).exists()


def test_script_leaves_a_strange_partial_file_alone(script, arguments, capsys):
    partial(arguments).parent.mkdir()
    partial(arguments).write_text("my notes\n", encoding="utf-8")
    assert script.main(command(arguments)) == 2
    assert "is no partial result" in capsys.readouterr().err
    assert partial(arguments).read_text(encoding="utf-8") == "my notes\n"


@pytest.mark.parametrize(
    ("arguments_changed", "content", "message"),
    [
        ({}, '{"instruction": "x"}\n', "line 1: field 'output' is missing"),
        ({}, '{"instruction": "x", "output": "y"}\n', "rows.jsonl: row 1: a row to be scored must have an answer"),
        (
            {},
            json.dumps(choice_row(0)) + "\n" + json.dumps(choice_row(0, ("a", "a-b"))),
            "rows.jsonl: row 2: no option's tokens may begin with all those of another",
        ),
        ({"--dataset": "missing.jsonl"}, None, "missing.jsonl: cannot be read"),
        ({"--adapter": "missing"}, None, "--adapter must be a folder with adapter_config.json, got missing"),
    ],
)
def test_script_refuses_bad_input_before_the_model_is_loaded(
    script, arguments, monkeypatch, capsys, arguments_changed, content, message
):
    monkeypatch.setattr(script, "load_model", interrupt)
    if content:
        arguments["--dataset"].write_text(content, encoding="utf-8")
    assert script.main(command(arguments | arguments_changed)) == 2
    assert message in capsys.readouterr().err
    assert not arguments["--output"].parent.exists()


@pytest.mark.parametrize(("end", "status"), [(KeyboardInterrupt, 130), (OSError, 2), (MemoryError, None)])
def test_script_leaves_nothing_behind_when_the_model_cannot_be_loaded(script, arguments, monkeypatch, end, status):
    def load_model(*_):
        raise end("no more")

    monkeypatch.setattr(script, "load_model", load_model)
    with nullcontext() if status else pytest.raises(end):
        assert script.main(command(arguments)) == status
    assert not list(arguments["--output"].parent.iterdir())


def test_script_draws_a_limited_sample_by_seed_and_names_tasks_after_files(script, tmp_path):
    rows = [{"instruction": f"Q{i}", "output": "1", "answer": "1", "task": "given" * (i == 0)} for i in range(50)]
    (tmp_path / "boolq").mkdir()
    paths = [tmp_path / "boolq" / "test.json", tmp_path / "arc.json"]
    for path in paths:
        path.write_text(json.dumps(rows), encoding="utf-8")
    every = script.Questions(paths, None, 0)
    assert len(every) == 100
    assert [row["task"] for row in every] == ["given", *["boolq"] * 49, "given", *["arc"] * 49]
    assert list(script.Questions(paths, 50, 0)) == list(every)
    some = script.Questions(paths, 5, 0)
    first, again, other = list(some), list(some), list(script.Questions(paths, 5, 1))
    assert len(some) == len(first) == 10
    assert first == again != other
    assert [int(row["instruction"][1:]) for row in first[:5]] == sorted(
        int(row["instruction"][1:]) for row in first[:5]
    )


def test_script_holds_no_more_for_four_times_the_rows(script, arguments, monkeypatch):
    """What Python holds at most once the model is there; tests/torture/memory.py looks at the whole process."""
    load = script.load_model

    def load_and_start(*args):
        loaded = load(*args)
        tracemalloc.start()
        return loaded

    monkeypatch.setattr(script, "load_model", load_and_start)
    monkeypatch.setattr("lslora.evaluation.WINDOW", 2)
    monkeypatch.setattr("lslora.json_rows.PIECE", 4096)
    arguments |= {"--batch_size": 25, "--max_new_tokens": 1}
    peaks = []
    for count in (40, 160):  # the smaller is enough for caches to fill
        text = "".join(json.dumps(row) + "\n" for row in ALL_ROWS * count)
        arguments["--dataset"].write_text(text, encoding="utf-8")
        assert script.main(command(arguments, "--quiet")) == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(json.loads(arguments["--output"].read_text(encoding="utf-8"))["predictions"]) == 10 * count
    assert peaks[1] - peaks[0] < 0.75 * len(text)  # the text of the further rows alone; caches still grow a little


def test_every_subset_is_drawn_as_often(script):
    """Three of five rows: ten subsets, each with probability 1/10."""
    drawn = Counter(tuple(script.drawn(range(5), 3, seed)) for seed in range(3000))
    assert len(drawn) == 10 and all(len(subset) == 3 for subset in drawn)
    assert chisquare(list(drawn.values())).pvalue > 0.001


def test_script_tells_that_its_data_changed_and_keeps_what_was_answered(script, arguments, monkeypatch, capsys):
    add = PartialResults.add

    def add_and_change(results, side, prediction):
        add(results, side, prediction)
        arguments["--dataset"].write_text(json.dumps(ALL_ROWS[0]), encoding="utf-8")

    monkeypatch.setattr("lslora.evaluation.WINDOW", 1)
    monkeypatch.setattr(PartialResults, "add", add_and_change)
    lines = [json.dumps(row) + "\n" for row in ALL_ROWS]
    lines.insert(5, 200_000 * "\n")  # more than is read at once
    arguments["--dataset"].write_text("".join(lines), encoding="utf-8")
    assert script.main(command(arguments)) == 2
    assert "must stay as it is while it is used" in capsys.readouterr().err
    assert len(partial(arguments).read_bytes().splitlines()) > 1
    assert not arguments["--output"].exists()


@pytest.mark.parametrize(
    "line", ["--dataset x --output y", "--dataset x --output y --model_name z --base", "--batch_size 0 --dataset x"]
)
def test_script_refuses_arguments_that_make_no_sense(script, line):
    with pytest.raises(SystemExit) as exit_info:
        script.main(line.split())
    assert exit_info.value.code == 2
