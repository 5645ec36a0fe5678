"""How often a model answers right: likelihood of the options, or greedy generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .answers import choose_scorer, grade
from .data import Row, to_prompt_completion
from .likelihood import Model, eval_mode, score_options, tokenize_options
from .prompts import pad_id, pad_left, prompt_ids
from .scoring import Prediction


def evaluate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    scorer: str = "auto",
    batch_size: int = 16,
    max_new_tokens: int = 256,
    chat_template: bool = False,
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
        chat_template: As for `score_options`: the way the model was trained to be asked.
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

    def answer(kind: str, batch: list[Row]) -> Iterator[dict[str, Any]]:
        if kind == "likelihood":
            return _likeliest(batch, score_options(model, tokenizer, batch, chat_template=chat_template))
        texts = generate_answers(model, tokenizer, batch, max_new_tokens=max_new_tokens, chat_template=chat_template)
        return _graded(batch, texts)

    with eval_mode(model):
        for kind, batch in _batches(rows, scorers, batch_size):
            if all(index in predictions for index in batch):
                continue
            for index, result in zip(batch, answer(kind, [rows[index] for index in batch]), strict=True):
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


def check_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], scorer: str = "auto", *, chat_template: bool = False
) -> None:
    """Make sure, before a model is loaded or trained, that every row can be scored.

    Args:
        tokenizer: The tokenizer that `evaluate` will be given.
        rows: Rows as `load_rows` returns them.
        scorer: See `choose_scorer`.
        chat_template: As for `score_options`.

    Raises:
        ValueError: a row cannot be scored so, or its options cannot be told apart by their tokens; the message gives
            its index.
    """
    for index, kind in enumerate(row_scorers(rows, scorer)):
        if kind == "likelihood":
            try:
                tokenize_options(tokenizer, rows[index], chat_template)
            except ValueError as error:
                raise ValueError(f"row with index {index}: {error}") from error


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

    The most likely token at every step: sampling, penalties and other settings stored with the model do not apply.

    Args:
        model: Causal language model, with or without adapters.
        tokenizer: Its tokenizer.
        rows: Rows as `load_rows` returns them.
        max_new_tokens: Limit, in tokens.
        chat_template: As for `score_options`.

    Returns:
        For every row the text after the prompt, without special tokens.
    """
    end_ids = _end_ids(model, tokenizer)
    prompts = [prompt_ids(tokenizer, row, chat_template=chat_template) for row in rows]
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


def _end_ids(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's, with which training ends a completion, and the model's own."""
    own = model.generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(token for token in ids if token is not None))


def _batches(rows: Sequence[Row], scorers: Sequence[str], batch_size: int) -> Iterator[tuple[str, list[int]]]:
    """Scorer and row indices of every batch: rows of one scorer and of similar length, the longest first."""
    for kind in ("likelihood", "generate"):
        indices = [index for index, scorer in enumerate(scorers) if scorer == kind]
        indices.sort(key=lambda index: -len(to_prompt_completion(rows[index])["prompt"]))
        for i in range(0, len(indices), batch_size):
            yield kind, indices[i : i + batch_size]


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
