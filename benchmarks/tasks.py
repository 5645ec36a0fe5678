"""Rows as tensors, and what a run is judged by: the likelihood of the completions and the accuracy of the answers.

Layers below the first adapted one never change. `Prefix` computes their output once for every row and keeps it on
disk; a model that starts there learns exactly what the whole model would, in a fraction of the time.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from lslora.answers import option_completion, options_of
from lslora.data import Row, load_rows, to_prompt_completion
from lslora.embedded import cache_folder

IGNORED = -100
BATCH_SIZE = 8
EVALUATED_AT_ONCE = {"cuda": 32}  # a small batch leaves a GPU idle

Example = dict[str, Any]

_NUMBERED = re.compile(r"[^:]*: (?P<question>.*?)\s*\n\n(?P<answers>Answer1:.*?)\s*Answer format:.*", re.DOTALL)
_ANSWER = re.compile(r"(Answer\d+): *(.*?)\s*(?=Answer\d+:|\Z)", re.DOTALL)


def load_examples(
    path: Path, tokenizer: Any, max_tokens: int, max_rows: int | None = None, cloze: bool = False
) -> list[Example]:
    """The file's rows of at most `max_tokens` tokens, or `max_rows` evenly spread ones, as `encode` returns them."""
    asked = [alternatives(row, cloze) for row in load_rows(path)]
    encoded = [(encode_text(right, tokenizer), wrong) for right, wrong in asked]
    fitting = [(example, wrong) for example, wrong in encoded if len(example["input_ids"]) < max_tokens]
    count = min(max_rows or len(fitting), len(fitting))
    return [with_wrong(*fitting[i * len(fitting) // count], tokenizer) for i in range(count)]


def encode(row: Row, tokenizer: Any, cloze: bool = False) -> Example:
    """The row as `encode_text` returns it, and under `wrong` the same with every other of its options, if it has any.

    Args:
        row: A row as `lslora.data.load_rows` returns it.
        tokenizer: The model's.
        cloze: Ask without naming the options, and answer with the option's text (`written_out`).
    """
    right, wrong = alternatives(row, cloze)
    return with_wrong(encode_text(right, tokenizer), wrong, tokenizer)


def alternatives(row: Row, cloze: bool) -> tuple[Row, list[Row]]:
    """The row with its right completion and with each of the wrong ones, asked as `encode` says."""
    return written_out(row) if cloze else (row, other_answers(row))


def with_wrong(example: Example, wrong: Sequence[Row], tokenizer: Any) -> Example:
    """The example with the rows of its wrong completions, encoded."""
    return example | {"wrong": [encode_text(other, tokenizer) for other in wrong]}


def encode_text(row: Row, tokenizer: Any) -> Example:
    """`input_ids` (T,) int64 and `targets` (T,): the token that follows, or −100 where it belongs to the prompt."""
    text = to_prompt_completion(row)
    prompt = tokenizer(text["prompt"])["input_ids"]
    completion = tokenizer(text["completion"], add_special_tokens=False)["input_ids"]
    ids = torch.tensor([*prompt, *completion, tokenizer.eos_token_id])
    targets = ids[1:].clone()
    targets[: len(prompt) - 1] = IGNORED
    return {"input_ids": ids[:-1], "targets": targets}


def other_answers(row: Row) -> list[Row]:
    """The row with each of the options that are not its answer."""
    options = [option for option in options_of(row) or () if option != row["answer"]]
    return [row | {"output": option_completion(row, option)} for option in options]


def written_out(row: Row) -> tuple[Row, list[Row]]:
    """A question with numbered answers → the question alone, answered by the right text and by each of the others.

    Raises:
        ValueError: the instruction is not `…: QUESTION` and `Answer1: … Answer2: …` with one of them the answer.
    """
    found = _NUMBERED.fullmatch(row["instruction"])
    texts = {name.lower(): text for name, text in _ANSWER.findall(found["answers"])} if found else {}
    if not found or row["answer"] not in texts:
        raise ValueError(f"a row must ask for one of its numbered answers, got {row['instruction']!r}")
    asked = {name: row | {"instruction": found["question"], "output": text} for name, text in texts.items()}
    return asked.pop(row["answer"]), list(asked.values())


def candidates(example: Example) -> list[Example]:
    """The right answer first, then the wrong ones."""
    return [example, *example["wrong"]]


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch padded on the right, where causal attention never looks."""
    inputs = "states" if "states" in examples[0] else "input_ids"
    return {
        inputs: pad_sequence([example[inputs] for example in examples], batch_first=True),
        "targets": pad_sequence([e["targets"] for e in examples], batch_first=True, padding_value=IGNORED),
    }


def completion_logits(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (N, vocabulary) in fp32 at the N positions that predict a completion's token, and those tokens (N,)."""
    inputs = {"inputs_embeds": batch["states"]} if "states" in batch else {"input_ids": batch["input_ids"]}
    hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    picked = batch["targets"] != IGNORED
    return model.get_output_embeddings()(hidden[picked]).float(), batch["targets"][picked]


def evaluate(model: Any, examples: Sequence[Example]) -> dict[str, Any]:
    """What the model makes of held-out rows.

    Returns:
        `nll`, mean negative log-likelihood per token of the right completions in nats; `row_nll`, its sum in every
        row, and `row_tokens`; and, where rows have options, `accuracy` (share whose likeliest completion is the right
        one) and `row_correct`.
    """
    found = iter(likelihoods(model, [candidate for example in examples for candidate in candidates(example)]))
    rows = [[next(found) for _ in candidates(example)] for example in examples]
    nll, counts = [row[0][0] for row in rows], [row[0][1] for row in rows]
    result = {"nll": sum(nll) / sum(counts), "row_nll": nll, "row_tokens": counts}
    if all(example["wrong"] for example in examples):
        correct = [all(right < other for other, _ in wrong) for (right, _), *wrong in rows]
        result |= {"accuracy": sum(correct) / len(correct), "row_correct": correct}
    return result


@torch.inference_mode()
def likelihoods(model: Any, examples: Sequence[Example]) -> list[tuple[float, int]]:
    """Negative log-likelihood in nats and number of tokens of every completion, with the end of sequence."""
    model.eval()
    device = next(model.parameters()).device
    counts = [int((example["targets"] != IGNORED).sum()) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["targets"]))
    nll = [0.0] * len(examples)
    batch_size = EVALUATED_AT_ONCE.get(device.type, BATCH_SIZE)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = {name: tensor.to(device) for name, tensor in collate([examples[i] for i in rows]).items()}
        losses = cross_entropy(*completion_logits(model, batch), reduction="none").split([counts[i] for i in rows])
        for i, row_losses in zip(rows, losses, strict=True):
            nll[i] = row_losses.sum().item()
    return list(zip(nll, counts, strict=True))


class Skipped(nn.Module):
    """Stands where a layer was whose output is already known."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class Prefix:
    """The layers of a causal language model below `first_layer`, taken out of it and applied to rows beforehand.

    Args:
        model: A model whose decoder has `layers` and `norm` (Llama, Qwen, Mistral, Phi-3, …); its lower layers are
            replaced by `Skipped`, so that it continues from `states`.
        first_layer: Index of the first layer that stays.
        name: What the states are kept under on disk, together with the rows' tokens.
    """

    def __init__(self, model: Any, first_layer: int, name: str) -> None:
        self.decoder, self.first_layer, self.name = model.get_decoder(), first_layer, name
        self.lower = [self.decoder.layers[i] for i in range(first_layer)]
        for i in range(first_layer):
            self.decoder.layers[i] = Skipped()

    def attach_states(self, examples: list[Example]) -> None:
        """Give every example its `states` (T, hidden), from disk if they were computed before."""
        key = hashlib.sha256(repr([e["input_ids"].tolist() for e in examples]).encode()).hexdigest()[:16]
        path = cache_folder() / "states" / f"{self.name}-{self.first_layer}-{key}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            torch.save(self._compute(examples), temporary)
            temporary.replace(path)
        for example, states in zip(examples, torch.load(path, mmap=True), strict=True):
            example["states"] = states

    @torch.inference_mode()
    def _compute(self, examples: list[Example]) -> list[Tensor]:
        upper, norm = list(self.decoder.layers), self.decoder.norm
        self.decoder.norm = nn.Identity()
        for i in range(len(upper)):
            self.decoder.layers[i] = self.lower[i] if i < self.first_layer else Skipped()
        found: list[Tensor] = []
        for start in range(0, len(examples), BATCH_SIZE):
            ids = [example["input_ids"] for example in examples[start : start + BATCH_SIZE]]
            hidden = self.decoder(pad_sequence(ids, batch_first=True), use_cache=False).last_hidden_state
            found += [states[: len(row)].clone() for states, row in zip(hidden, ids, strict=True)]
        self.decoder.norm = norm
        for i, layer in enumerate(upper):
            self.decoder.layers[i] = layer
        return found
