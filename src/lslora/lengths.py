"""How many tokens a model takes; which examples are cut, or teach nothing, when a trainer keeps the first of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from .data import Example
from .prompts import chat_ids, common_prefix, example_ids

MAX_SHOWN_EXAMPLES = 10


def position_limit(model: Any) -> int | None:
    """How many tokens a causal language model takes at all.

    Args:
        model: A model of transformers, with or without adapters, also one on the meta device.

    Returns:
        The length of the table that it looks positions up in (GPT-2, OPT, GPT-J, ...), beyond which it ends in an
        IndexError; None where positions are computed and nothing ends (rotary ones, ALiBi, state spaces).
    """
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    words = model.get_input_embeddings()
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    tables += [len(table) for name, table in model.named_buffers() if name.endswith("embed_positions")]
    # OPT's and BART's have two entries before the first.
    return positions if positions and any(length in (positions, positions + 2) for length in tables) else None


def position_limit_of(name: str) -> int | None:
    """`position_limit` of the model in a folder or with this hub id, of which only the configuration is read."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    with torch.device("meta"):
        return position_limit(AutoModelForCausalLM.from_config(config, trust_remote_code=False))


class Fit(NamedTuple):
    """The examples that are left, how many are longer than `max_length` tokens, and which teach nothing.

    `dropped` numbers the examples from 1, in the order of the file; of a conversation every answer is one.
    """

    kept: list[Example]
    longer: int
    dropped: list[int]
    max_length: int

    def __str__(self) -> str:
        total = len(self.kept) + len(self.dropped)
        text = f"{self.longer} of {total} examples have more than {self.max_length} tokens and are cut"
        if not self.dropped:
            return text
        shown = ", ".join(map(str, self.dropped[:MAX_SHOWN_EXAMPLES]))
        rest = len(self.dropped) - MAX_SHOWN_EXAMPLES
        more = f" and {rest} more" if rest > 0 else ""
        return f"{text}; {len(self.dropped)} of all keep nothing to learn and are dropped: number {shown}{more}"


def fit_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int, *, loss_on_prompt: bool = False
) -> Fit:
    """Sort out the examples of which nothing is learned once TRL's trainer has cut them after `max_length` tokens.

    That is where the prompt alone fills them. The trainer drops such examples as well, but says nothing.

    Args:
        tokenizer: The model's tokenizer.
        examples: Examples as `load_examples` returns them.
        max_length: How many tokens are kept of each, with the one that ends it.
        loss_on_prompt: Whether the prompt's tokens are learned too.

    Returns:
        The examples that are left, unchanged, and what there is to tell.

    Raises:
        ValueError: no example is left, the tokenizer has no end-of-sequence token for an example that is no
            conversation, or its chat template refuses one that is.
    """
    kept, longer, dropped = [], 0, []
    for number, example in enumerate(examples, start=1):
        try:
            ids, start = _learned(tokenizer, example)
            length = len(ids) + _ends_with_a_token(tokenizer, example)
        except ValueError as error:
            raise ValueError(f"example {number}: {error}") from error
        longer += length > max_length
        # Nothing predicts the first token, so it is never learned.
        if max(1, 0 if loss_on_prompt else start) < min(length, max_length):
            kept.append(example)
        else:
            dropped.append(number)
    fit = Fit(kept, longer, dropped, max_length)
    if not kept:
        raise ValueError(f"at least one example must have something to learn: {fit}")
    return fit


def _learned(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], int]:
    """An example's token ids, and where what is learned begins: where they are no longer those of the prompt."""
    ids = example_ids(tokenizer, example)
    if "text" in example:
        return ids, 0
    prompt = example["prompt"]
    if isinstance(prompt, str):
        return ids, len(common_prefix([list(tokenizer(prompt)["input_ids"]), ids]))
    return ids, len(common_prefix([chat_ids(tokenizer, prompt, add_generation_prompt=True), ids]))


def _ends_with_a_token(tokenizer: PreTrainedTokenizerBase, example: Example) -> bool:
    """Whether the trainer puts an end-of-sequence token behind the example: a chat template does so itself."""
    end = example["text"] if "text" in example else example["completion"]
    if not isinstance(end, str):
        return False
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer must have an end-of-sequence token, which the trainer puts behind it")
    return not end.endswith(tokenizer.eos_token)
