"""From rows to token ids, the way training makes them, and from token ids to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .data import Example, Row, to_messages, to_prompt_completion


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, row: Row, completion: str = "", *, chat_template: bool = False
) -> list[int]:
    """Token ids of a row's prompt with a completion behind it: as in training, but for what ends a completion there.

    Args:
        tokenizer: The model's tokenizer.
        row: A row as `load_rows` returns it.
        completion: What follows the prompt; tokenized together with it.
        chat_template: Whether the tokenizer's chat template makes the prompt, or `to_prompt_completion`.

    Returns:
        The ids with the special tokens that come first and without an end-of-sequence token.

    Raises:
        ValueError: `chat_template` is set and the tokenizer has none, or one that refuses the row.
    """
    if chat_template:
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer must have a chat template to be asked with one, this one has none")
        prompt = _chat(tokenizer, to_messages(row)["prompt"], tokenize=False, add_generation_prompt=True)
        return list(tokenizer(f"{prompt}{completion}", add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(to_prompt_completion(row)["prompt"] + completion)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def example_ids(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    """Token ids of a whole training example, as `load_examples` returns it, without padding."""
    if "text" in example:
        return list(tokenizer(example["text"])["input_ids"])
    prompt, completion = example["prompt"], example["completion"]
    if isinstance(prompt, str):
        return list(tokenizer(f"{prompt}{completion}")["input_ids"])
    return chat_ids(tokenizer, [*prompt, *completion])


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
) -> list[int]:
    """Token ids of messages by the tokenizer's chat template; ValueError where it refuses them, as for their roles."""
    chat = _chat(tokenizer, messages, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt)
    return list(chat["input_ids"])


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template ends an answer; None where it ends with none of the tokenizer's own.

    It need not be the tokenizer's end-of-sequence token: those of base models often end documents, not turns.
    """
    answer = "∎"
    messages = to_messages({"instruction": "?", "output": answer})
    chat = str(_chat(tokenizer, [*messages["prompt"], *messages["completion"]], tokenize=False))
    behind = tokenizer(chat.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    own = tokenizer.added_tokens_decoder  # made anew whenever it is asked for
    return next((token for token in behind if token in own), None)


def _chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **settings: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **settings)
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses the messages: {error}") from error


def common_prefix(sequences: Sequence[list[int]]) -> list[int]:
    """The tokens that all sequences begin with."""
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return sequences[0][:length]


def pad_left(
    sequences: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both int64 (sequences, tokens), with all sequences ending in the last column."""
    width = max(map(len, sequences))
    ids = [[pad_id(tokenizer)] * (width - len(sequence)) + sequence for sequence in sequences]
    mask = [[0] * (width - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill up with; any will do, as it is masked out."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(candidate for candidate in candidates if candidate is not None)
