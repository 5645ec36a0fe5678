"""How often a model answers right: likelihood of the options, or greedy generation."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations
from typing import Any, NamedTuple, TypeAlias

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .data import Row, to_prompt_completion
from .scoring import Prediction, choose_scorer, grade, option_completion, options_of

Model: TypeAlias = PreTrainedModel | PeftModel


def evaluate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    scorer: str = "auto",
    batch_size: int = 16,
    max_new_tokens: int = 256,
    known: Sequence[Prediction] = (),
    on_prediction: Callable[[Prediction], None] | None = None,
) -> list[Prediction]:
    """Let a model answer every row, and grade the answers.

    Rows of similar length share a batch, the longest first. The batches follow from the rows and `batch_size` alone,
    so that an evaluation taken up again with `known` computes the same numbers as one that was never interrupted.

    Args:
        model: Causal language model, with or without adapters; used in eval mode and left in the mode it came in.
        tokenizer: Its tokenizer.
        rows: Rows as `load_rows` returns them, all with an answer.
        scorer: `"likelihood"`, `"generate"` or `"auto"` (see `choose_scorer`).
        batch_size: Rows a batch.
        max_new_tokens: Limit for generated answers, in tokens.
        known: Predictions of an earlier call with the same arguments; their rows are not computed again.
        on_prediction: Called with every new prediction as soon as its batch is done.

    Returns:
        One prediction a row, in the order of the rows: `index`, `task`, `answer`, `prediction`, `correct`, and
        `log_likelihoods` (option to value) or `text` (what was generated).

    Raises:
        ValueError: `batch_size` or `max_new_tokens` is below 1, `scorer` is unknown, or a row cannot be scored so; the
            message gives the row's index.
    """
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    scorers = row_scorers(rows, scorer)
    predictions = {prediction["index"]: prediction for prediction in known}
    with _eval_mode(model):
        for kind, batch in _batches(rows, scorers, batch_size):
            if all(index in predictions for index in batch):
                continue
            graded = _answer(model, tokenizer, [rows[index] for index in batch], kind, max_new_tokens)
            for index, result in zip(batch, graded, strict=True):
                if index not in predictions:
                    head = {"index": index, "task": rows[index].get("task", ""), "answer": rows[index]["answer"]}
                    predictions[index] = head | result
                    if on_prediction:
                        on_prediction(predictions[index])
    return [predictions[index] for index in range(len(rows))]


def row_scorers(rows: Sequence[Row], scorer: str = "auto") -> list[str]:
    """Decide for every row how it is scored, and check that it can be.

    Args:
        rows: Rows as `load_rows` returns them.
        scorer: See `choose_scorer`.

    Returns:
        `"likelihood"` or `"generate"` for every row.

    Raises:
        ValueError: a row cannot be scored so; the message gives its index.
    """
    chosen = []
    for index, row in enumerate(rows):
        try:
            chosen.append(choose_scorer(row, scorer))
        except ValueError as error:
            raise ValueError(f"row with index {index}: {error}") from error
    return chosen


@torch.inference_mode()
def score_options(model: Model, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[dict[str, float]]:
    """Log-likelihood of every option's completion, given the prompt, for one batch of rows.

    `Σ_j log p(completion_j | prompt, completion_{<j})` over the completion's tokens. The tokens that all options of a
    row begin with (the prompt and mostly "the correct answer is") pass the model once; only what is left of the
    options follows, on copies of the key-value cache, and where a single token is left not even that is needed.

    Prompt and completion are tokenized together, as in training. In training an end-of-sequence token follows; here it
    is left out: how readily a model stops is no part of its answer, and a base model never learnt to stop there.

    Args:
        model: Causal language model, with or without adapters.
        tokenizer: Its tokenizer.
        rows: Rows with options, whose outputs contain their answers.

    Returns:
        For every row: option to log-likelihood (natural logarithm), in the order of `options_of`.

    Raises:
        ValueError: a row has no options, or its output does not contain its answer, or the tokens of one option begin
            with all those of another (which could then never be the less likely one), or the model yields NaN.
    """
    choices = [_tokenize_options(tokenizer, row) for row in rows]
    with _eval_mode(model):
        input_ids, mask = _pad_left([choice.shared for choice in choices], tokenizer, model.device)
        # Logits predict the next token: one position before each shared completion token, and the last of all.
        keep = 1 + max(len(choice.shared) - choice.start for choice in choices)
        output = _forward(model, input_ids, mask, _positions(mask), logits_to_keep=keep)
        log_probs = _log_probs(output.logits[:, -keep:])
        totals = []
        for row, choice in zip(log_probs, choices, strict=True):
            completion = choice.shared[choice.start :]
            common = _picked(row[keep - 1 - len(completion) : keep - 1], completion)
            totals.append([common + row[-1, tail[0]].item() for tail in choice.tails])
        rest = [(i, j) for i, choice in enumerate(choices) for j, tail in enumerate(choice.tails) if len(tail) > 1]
        if rest:
            tails = [choices[i].tails[j] for i, j in rest]
            added = _continue(model, output.past_key_values, mask, [i for i, _ in rest], tails)
            for (i, j), value in zip(rest, added, strict=True):
                totals[i][j] += value
    for total in totals:
        if not all(map(math.isfinite, total)):  # the likeliest would be the first, whatever the row
            raise ValueError(f"log-likelihoods must be finite, got {total}")
    return [dict(zip(options_of(row) or (), total, strict=True)) for row, total in zip(rows, totals, strict=True)]


@torch.inference_mode()
def generate_answers(
    model: Model, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, max_new_tokens: int
) -> list[str]:
    """Greedy continuation of the prompts of one batch of rows.

    The most likely token at every step: sampling, penalties and other settings stored with the model do not apply.

    Args:
        model: Causal language model, with or without adapters.
        tokenizer: Its tokenizer.
        rows: Rows as `load_rows` returns them.
        max_new_tokens: Limit, in tokens.

    Returns:
        For every row the text after the prompt, without special tokens.
    """
    end_ids = _end_ids(model, tokenizer)
    prompts = [_token_ids(tokenizer, to_prompt_completion(row)["prompt"]) for row in rows]
    with _eval_mode(model):
        input_ids, mask = _pad_left(prompts, tokenizer, model.device)
        greedy = GenerationConfig(
            use_cache=True,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            max_new_tokens=max_new_tokens,
            eos_token_id=end_ids or None,
            pad_token_id=_pad_id(tokenizer),
        )
        output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=greedy)  # type: ignore[operator]
    return tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)


class _Choice(NamedTuple):
    """The options of a row in tokens: `shared + tail` is prompt and completion, which begins at `shared[start]`."""

    shared: list[int]
    start: int
    tails: list[list[int]]


def _tokenize_options(tokenizer: PreTrainedTokenizerBase, row: Row) -> _Choice:
    prompt = to_prompt_completion(row)["prompt"]
    options = options_of(row)
    if not options:
        raise ValueError("the instruction must end in 'Answer format: a/b/...', got one without")
    sequences = [_token_ids(tokenizer, prompt + option_completion(row, option)) for option in options]
    shared = _common_prefix(sequences)
    if any(longer[: len(ids)] == ids for ids, longer in permutations(sequences, 2)):
        raise ValueError(f"no option's tokens may begin with all those of another, got the options {options}")
    start = len(_common_prefix([_token_ids(tokenizer, prompt), shared]))
    return _Choice(shared, start, [ids[len(shared) :] for ids in sequences])


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids as in training (special tokens at the start included), without an end-of-sequence token."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _common_prefix(sequences: Sequence[list[int]]) -> list[int]:
    """The tokens that all sequences begin with."""
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return sequences[0][:length]


def _pad_left(
    sequences: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both int64 (sequences, tokens), with all sequences ending in the last column."""
    width = max(map(len, sequences))
    ids = [[_pad_id(tokenizer)] * (width - len(sequence)) + sequence for sequence in sequences]
    mask = [[0] * (width - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill up with; any will do, as it is masked out."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(candidate for candidate in candidates if candidate is not None)


def _end_ids(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's, with which training ends a completion, and the model's own."""
    own = model.generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(token for token in ids if token is not None))


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Position of every token in its own sequence, from 0; padding counts as 0."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def _forward(
    model: Model, input_ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, **further: Any
) -> Any:
    """Call the model with a cache, leaving out those of the further arguments that its architecture lacks."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    accepted = inspect.signature(base.forward).parameters
    further = {name: value for name, value in (further | {"position_ids": positions}).items() if name in accepted}
    return model(input_ids=input_ids, attention_mask=mask, use_cache=True, **further)


def _log_probs(logits: torch.Tensor) -> torch.Tensor:
    """Log-softmax over the vocabulary, in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def _picked(log_probs: torch.Tensor, tokens: list[int]) -> float:
    """Sum over positions of the log-probability (positions, vocabulary) of the token that stands there."""
    index = torch.tensor(tokens, dtype=torch.int64, device=log_probs.device)
    return log_probs.gather(1, index[:, None]).sum().item()


def _continue(
    model: Model, cache: Any, mask: torch.Tensor, sources: list[int], tails: Sequence[list[int]]
) -> list[float]:
    """Log-likelihood of every tail but for its first token, each after the cached sequence that `sources` names."""
    source = torch.tensor(sources, device=mask.device)
    cache.reorder_cache(source)  # any selection of rows, repeated ones included
    width = max(map(len, tails)) - 1
    ids = torch.tensor([tail[:-1] + [0] * (width + 1 - len(tail)) for tail in tails], device=mask.device)
    ids_mask = torch.tensor([[1] * (len(tail) - 1) + [0] * (width + 1 - len(tail)) for tail in tails]).to(mask)
    whole = torch.cat([mask[source], ids_mask], dim=1)
    output = _forward(model, ids, whole, _positions(whole)[:, -width:], past_key_values=cache)
    log_probs = _log_probs(output.logits)
    return [_picked(row[: len(tail) - 1], tail[1:]) for row, tail in zip(log_probs, tails, strict=True)]


def _batches(rows: Sequence[Row], scorers: Sequence[str], batch_size: int) -> Iterator[tuple[str, list[int]]]:
    """Scorer and row indices of every batch: rows of one scorer and of similar length, the longest first."""
    for kind in ("likelihood", "generate"):
        indices = [index for index, scorer in enumerate(scorers) if scorer == kind]
        indices.sort(key=lambda index: -len(to_prompt_completion(rows[index])["prompt"]))
        for i in range(0, len(indices), batch_size):
            yield kind, indices[i : i + batch_size]


def _answer(
    model: Model, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], kind: str, max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """What a prediction says beyond its row, for one batch; of equally likely options, the first is chosen."""
    if kind == "likelihood":
        for row, scores in zip(rows, score_options(model, tokenizer, rows), strict=True):
            chosen = max(scores, key=lambda option: scores[option])
            yield {"prediction": chosen, "correct": chosen == row["answer"], "log_likelihoods": scores}
    else:
        texts = generate_answers(model, tokenizer, rows, max_new_tokens=max_new_tokens)
        for row, text in zip(rows, texts, strict=True):
            prediction, correct = grade(row, text)
            yield {"prediction": prediction, "correct": correct, "text": text}


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside, and every module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
