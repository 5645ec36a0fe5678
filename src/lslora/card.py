"""The model card of a trained adapter: what it is, how to load it, how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .embedded import NAME
from .scoring import format_table

TITLES = {"lslora": "LS-LoRA", "lora": "LoRA"}
ARTICLES = {"lslora": "An", "lora": "A"}


def model_card(
    model_name: str,
    method: str,
    settings: Mapping[str, Any],
    *,
    losses: Sequence[float] = (),
    accuracy: Mapping[str, Any] | None = None,
) -> str:
    """The text of a model card (Markdown with the hub's metadata block).

    Args:
        model_name: The base model, as given to training.
        method: `"lslora"` or `"lora"`.
        settings: Name to value of everything the run was told, `dataset_path` among it.
        losses: The training losses as logged, in nats a token.
        accuracy: Heading to summary (`lslora.scoring.summarize`), if the run was evaluated.

    Returns:
        The text, which ends with a new line.

    Raises:
        KeyError: `method` is another, or `settings` has no `dataset_path`.
    """
    title, data = TITLES[method], Path(settings["dataset_path"]).name
    sections = [
        _metadata(model_name, method),
        f"# {title} adapter for {model_name}",
        f"{ARTICLES[method]} {title} adapter trained on `{data}` with the `lslora` package.",
        "## Load it\n\n" + _snippet(model_name, method),
    ]
    if accuracy:
        sections.append(f"## Accuracy in per cent, with 95 % intervals\n\n```\n{format_table(accuracy)}\n```")
    if losses:
        sections.append(f"Training loss: {losses[0]:.4f} at the first log entry, {losses[-1]:.4f} at the last.")
    rows = "\n".join(f"| `{name}` | `{value}` |" for name, value in settings.items())
    sections.append(f"## Settings\n\n| setting | value |\n|---|---|\n{rows}")
    return "\n\n".join(sections) + "\n"


def _metadata(model_name: str, method: str) -> str:
    base = "HuggingFaceTB/SmolLM2-135M-Instruct" if model_name == NAME else model_name
    tags = "\n".join(f"- {tag}" for tag in ("lora", *(("lslora",) if method == "lslora" else ())))
    return f"---\nlibrary_name: peft\nbase_model: {base}\npipeline_tag: text-generation\ntags:\n{tags}\n---"


def _snippet(model_name: str, method: str) -> str:
    lines = ["import lslora  # registers the method with peft; without it peft cannot load the adapter"]
    name = repr(model_name)
    if method == "lora":
        lines = []
    if model_name == NAME:
        lines.append("from lslora.embedded import resolve_model_name")
        name = f"resolve_model_name({name})"
    lines += [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"base = {name}",
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), 'path/to/this/folder')",
        "tokenizer = AutoTokenizer.from_pretrained('path/to/this/folder')",
    ]
    return "```python\n" + "\n".join(lines) + "\n```"
