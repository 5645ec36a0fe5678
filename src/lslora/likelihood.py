"""Log-likelihood of the options of a row."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations
from typing import Any, NamedTuple, TypeAlias

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .answers import option_completion, options_of
from .data import Row
from .prompts import common_prefix, pad_left, prompt_ids

Model: TypeAlias = PreTrainedModel | PeftModel
# transformers' names of what a model remembers of a sequence: since 5.24; before, with attention and without.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


@torch.inference_mode()
def score_options(
    model: Model, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, chat_template: bool = False
) -> list[dict[str, float]]:
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
        chat_template: Whether the tokenizer's chat template makes the prompts, or `to_prompt_completion`.

    Returns:
        For every row: option to log-likelihood (natural logarithm), in the order of `options_of`.

    Raises:
        ValueError: a row has no options, or its output does not contain its answer, or the tokens of one option begin
            with all those of another (which could then never be the less likely one), the model takes no cache,
            or it yields NaN.
    """
    choices = [tokenize_options(tokenizer, row, chat_template) for row in rows]
    with eval_mode(model):
        input_ids, mask = pad_left([choice.shared for choice in choices], tokenizer, model.device)
        # Logits predict the next token: one position before each shared completion token, and the last of all.
        keep = 1 + max(len(choice.shared) - choice.start for choice in choices)
        logits, cache = _forward(model, input_ids, mask, _positions(mask), logits_to_keep=keep)
        log_probs = _log_probs(logits[:, -keep:])
        totals = []
        for row, choice in zip(log_probs, choices, strict=True):
            completion = choice.shared[choice.start :]
            common = _picked(row[keep - 1 - len(completion) : keep - 1], completion)
            totals.append([common + row[-1, tail[0]].item() for tail in choice.tails])
        rest = [(i, j) for i, choice in enumerate(choices) for j, tail in enumerate(choice.tails) if len(tail) > 1]
        if rest:
            tails = [choices[i].tails[j] for i, j in rest]
            added = _continue(model, cache, mask, [i for i, _ in rest], tails)
            for (i, j), value in zip(rest, added, strict=True):
                totals[i][j] += value
    for total in totals:
        if not all(map(math.isfinite, total)):  # the likeliest would be the first, whatever the row
            raise ValueError(f"log-likelihoods must be finite, got {total}")
    return [dict(zip(options_of(row) or (), total, strict=True)) for row, total in zip(rows, totals, strict=True)]


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside, and every module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Choice(NamedTuple):
    """The options of a row in tokens: `shared + tail` is prompt and completion, which begins at `shared[start]`."""

    shared: list[int]
    start: int
    tails: list[list[int]]


def tokenize_options(tokenizer: PreTrainedTokenizerBase, row: Row, chat_template: bool) -> Choice:
    """The options of a row in tokens.

    Args:
        tokenizer: The model's tokenizer.
        row: A row with options, whose output contains its answer.
        chat_template: As for `score_options`.

    Raises:
        ValueError: the row has no options, its output does not contain its answer, or the tokens of one option begin
            with all those of another.
    """

    def ids_of(completion: str) -> list[int]:
        return prompt_ids(tokenizer, row, completion, chat_template=chat_template)

    options = options_of(row)
    if not options:
        raise ValueError("the instruction must end in 'Answer format: a/b/...', got one without")
    sequences = [ids_of(option_completion(row, option)) for option in options]
    shared = common_prefix(sequences)
    if any(longer[: len(ids)] == ids for ids, longer in permutations(sequences, 2)):
        raise ValueError(f"no option's tokens may begin with all those of another, got the options {options}")
    start = len(common_prefix([ids_of(""), shared]))
    return Choice(shared, start, [ids[len(shared) :] for ids in sequences])


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Position of every token in its own sequence, from 0; padding counts as 0."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def _forward(
    model: Model,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    cache: Any = None,
    **further: Any,
) -> tuple[torch.Tensor, Any]:
    """Logits and cache; positions and further arguments are left out where the architecture lacks them.

    Raises:
        ValueError: the model takes no cache, without which it would read the rest of an option as a text of its own.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    accepted = inspect.signature(base.forward).parameters
    cache_name = next((name for name in CACHE_NAMES if name in accepted), None)
    if cache_name is None:
        raise ValueError(f"the model's forward must take one of {CACHE_NAMES}, got one that takes {tuple(accepted)}")
    known = {name: value for name, value in (further | {"position_ids": positions}).items() if name in accepted}
    output = model(input_ids=input_ids, attention_mask=mask, use_cache=True, **known, **{cache_name: cache})
    return output.logits, getattr(output, cache_name)


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
    logits, _ = _forward(model, ids, whole, _positions(whole)[:, -width:], cache)
    log_probs = _log_probs(logits)
    return [_picked(row[: len(tail) - 1], tail[1:]) for row, tail in zip(log_probs, tails, strict=True)]
