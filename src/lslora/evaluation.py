"""How often a model answers right: likelihood of the options, or greedy generation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .answers import choose_scorer, grade
from .data import Row, to_prompt_completion
from .lengths import position_limit
from .likelihood import Model, eval_mode, score_options, tokenize_options
from .prompts import pad_id, pad_left, prompt_ids, turn_end
from .scoring import Prediction

WINDOW = 64  # batches whose rows are read, and sorted by length, at once


def evaluate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    rows: Collection[Row],
    *,
    on_prediction: Callable[[Prediction], None] | None = None,
    **settings: Any,
) -> list[Prediction]:
    """Let a model answer every row, and grade the answers: `predict`, in the order of the rows.

    Args:
        model: As for `predict`, like what follows.
        tokenizer: Its tokenizer.
        rows: Rows as `load_rows` returns them, all with an answer.
        on_prediction: Called with every prediction as soon as its batch is done.
        settings: The keyword arguments of `predict`.

    Raises:
        ValueError: as for `predict`.
    """
    predictions = []
    for prediction in predict(model, tokenizer, rows, **settings):
        predictions.append(prediction)
        if on_prediction:
            on_prediction(prediction)
    return sorted(predictions, key=_index)


def predict(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    rows: Collection[Row],
    *,
    scorer: str = "auto",
    batch_size: int = 16,
    max_new_tokens: int = 256,
    chat_template: bool = False,
    known: Iterable[Prediction] = (),
) -> Iterator[Prediction]:
    """Let a model answer rows and grade the answers, a batch after the other, whatever their number holding few.

    Rows of similar length share a batch, the longest first, among `WINDOW` batches each time. The batches follow from
    the rows and `batch_size` alone, so that an evaluation taken up again with `known` computes the same numbers as one
    that was never interrupted.

    Args:
        model: Causal language model, with or without adapters; used in eval mode and left in the mode it came in.
        tokenizer: Its tokenizer.
        rows: Rows as `load_rows` returns them or `RowFile` reads them, all with an answer; gone through twice.
        scorer: `"likelihood"`, `"generate"` or `"auto"` (see `choose_scorer`).
        batch_size: Rows a batch.
        max_new_tokens: Limit for generated answers, in tokens.
        chat_template: As for `score_options`: the way the model was trained to be asked.
        known: What an earlier call with the same arguments yielded, up to any point; it is not computed again.

    Returns:
        Yields one prediction a row, batch by batch, without those known: `index`, `task`, `answer`, `prediction`,
        `correct`, and `log_likelihoods` (option to value) or `text` (what was generated). `in_row_order` sorts them.

    Raises:
        ValueError: `batch_size` or `max_new_tokens` is below 1, `scorer` is unknown, or a row cannot be scored so (the
            message gives the row's index), all told by this call; while it yields, `known` is of another call.
    """
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for _ in with_scorers(rows, scorer):
        pass

    def answer(kind: str, batch: list[Row]) -> Iterator[dict[str, Any]]:
        if kind == "likelihood":
            return _likeliest(batch, score_options(model, tokenizer, batch, chat_template=chat_template))
        texts = generate_answers(model, tokenizer, batch, max_new_tokens=max_new_tokens, chat_template=chat_template)
        return _graded(batch, texts)

    def predictions() -> Iterator[Prediction]:
        earlier = iter(known)
        for kind, indices, batch in _batches(rows, scorer, batch_size):
            given = [prediction["index"] for prediction in islice(earlier, len(batch))]
            if given != indices[: len(given)]:
                raise ValueError(f"known predictions must be of rows {indices[: len(given)]} next, got {given}")
            if len(given) == len(batch):
                continue
            found = list(zip(indices, batch, answer(kind, batch), strict=True))
            for index, row, result in found[len(given) :]:
                yield {"index": index, "task": row.get("task", ""), "answer": row["answer"]} | result

    return predictions()


def in_row_order(predictions: Iterable[Prediction], batch_size: int) -> Iterator[Prediction]:
    """Sort what `predict` yielded with this `batch_size` into the order of the rows, holding `WINDOW` batches."""
    predictions = iter(predictions)
    while window := sorted(islice(predictions, WINDOW * batch_size), key=_index):
        yield from window


def by_index(index: int) -> str:
    """Where a row is, of rows that came from nowhere in particular."""
    return f"row with index {index}"


def with_scorers(
    rows: Iterable[Row], scorer: str = "auto", place: Callable[[int], str] = by_index
) -> Iterator[tuple[Row, str]]:
    """Decide for every row how it is scored, and check that it can be.

    Args:
        rows: Rows as `load_rows` returns them.
        scorer: See `choose_scorer`.
        place: Index → where that row is, in words.

    Returns:
        Yields every row with `"likelihood"` or `"generate"`.

    Raises:
        ValueError: a row cannot be scored so; the message gives its place.
    """
    for index, row in enumerate(rows):
        try:
            yield row, choose_scorer(row, scorer)
        except ValueError as error:
            raise ValueError(f"{place(index)}: {error}") from error


def check_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    scorer: str = "auto",
    *,
    chat_template: bool = False,
    positions: int | None = None,
    place: Callable[[int], str] = by_index,
) -> None:
    """Make sure, before a model is loaded or trained, that every row can be scored.

    Args:
        tokenizer: The tokenizer that `evaluate` will be given.
        rows: Rows as `load_rows` returns them.
        scorer: See `choose_scorer`.
        chat_template: As for `score_options`.
        positions: How many tokens the model takes at all (`lslora.lengths.position_limit`); None for any number.
        place: As for `with_scorers`.

    Raises:
        ValueError: a row cannot be scored so, its options cannot be told apart by their tokens, or it has more tokens
            than the model takes; the message gives its place.
    """
    for index, (row, kind) in enumerate(with_scorers(rows, scorer, place)):
        try:
            length = 0
            if kind == "likelihood":
                choice = tokenize_options(tokenizer, row, chat_template)
                length = len(choice.shared) + max(map(len, choice.tails))
            elif positions is not None:
                length = len(prompt_ids(tokenizer, row, chat_template=chat_template)) + 1
            if positions is not None and length > positions:
                raise ValueError(f"with its answer it must have at most the model's {positions} tokens, got {length}")
        except ValueError as error:
            raise ValueError(f"{place(index)}: {error}") from error


@torch.inference_mode()
def generate_answers(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    chat_template: bool = False,
) -> list[str]:
    """Greedy continuation of the prompts of one batch of rows.

    The most likely token at every step: sampling, beams and repetition penalties stored with the model do not apply;
    tokens that it is told to suppress are suppressed. An answer ends with an end-of-sequence token of the model or the
    tokenizer, or with the token that ends a turn of the chat template.

    Args:
        model: Causal language model, with or without adapters.
        tokenizer: Its tokenizer.
        rows: Rows as `load_rows` returns them.
        max_new_tokens: Limit, in tokens; less where the longest prompt leaves fewer of the model's positions.
        chat_template: As for `score_options`.

    Returns:
        For every row the text after the prompt, without special tokens.

    Raises:
        ValueError: a prompt fills the model's positions, or the chat template refuses a row.
    """
    prompts = [prompt_ids(tokenizer, row, chat_template=chat_template) for row in rows]
    end_ids = _end_ids(model, tokenizer, chat_template)
    longest = max(map(len, prompts))
    if positions := position_limit(model):
        if longest >= positions:
            raise ValueError(f"a prompt must have fewer than the model's {positions} tokens, got {longest}")
        max_new_tokens = min(max_new_tokens, positions - longest)
    with eval_mode(model):
        input_ids, mask = pad_left(prompts, tokenizer, model.device)
        greedy = GenerationConfig(
            use_cache=True,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            max_new_tokens=max_new_tokens,
            eos_token_id=end_ids or None,
            pad_token_id=pad_id(tokenizer),
        )
        output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=greedy)  # type: ignore[operator]
    return tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)


def _end_ids(model: Model, tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> list[int]:
    """The tokens that end an answer: those with which training ends a completion or a turn, and the model's own."""
    own = model.generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    if chat_template:
        ids.append(turn_end(tokenizer))
    return list(dict.fromkeys(token for token in ids if token is not None))


def _batches(rows: Iterable[Row], scorer: str, batch_size: int) -> Iterator[tuple[str, list[int], list[Row]]]:
    """Scorer, row indices and rows of every batch: of one scorer and similar length, the longest of a window first."""
    numbered = enumerate(with_scorers(rows, scorer))
    while window := list(islice(numbered, WINDOW * batch_size)):
        window.sort(key=lambda item: -len(to_prompt_completion(item[1][0])["prompt"]))
        for kind in ("likelihood", "generate"):
            found = [(index, row) for index, (row, scorer_of_row) in window if scorer_of_row == kind]
            for i in range(0, len(found), batch_size):
                indices, batch = zip(*found[i : i + batch_size], strict=True)
                yield kind, list(indices), list(batch)


def _index(prediction: Prediction) -> int:
    return int(prediction["index"])


def _likeliest(rows: Sequence[Row], likelihoods: Sequence[dict[str, float]]) -> Iterator[dict[str, Any]]:
    """What a prediction says beyond its row; of equally likely options, the first is chosen."""
    for row, scores in zip(rows, likelihoods, strict=True):
        chosen = max(scores, key=lambda option: scores[option])
        yield {"prediction": chosen, "correct": chosen == row["answer"], "log_likelihoods": scores}


def _graded(rows: Sequence[Row], texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What a prediction says beyond its row."""
    for row, text in zip(rows, texts, strict=True):
        prediction, correct = grade(row, text)
        yield {"prediction": prediction, "correct": correct, "text": text}
