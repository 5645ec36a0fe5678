"""Methods to compare, by name and options: each makes an adapter on a model, and says what of it learns.

`none` is the model as it is, never trained. `lora`, `dora`, `rslora` and `hira` are peft's own. `lslora` takes the
options of `LSLoraConfig`, `form` those of `benchmarks.forms.attach_forms`, `delta` those of
`benchmarks.elsewhere.attach_deltas`. Some controls are LS-LoRA with most of it frozen: `learns` names what of the
spline is trained (`weight`, `input_scale_offset`, `output_scale_offset`); `defects` are those of
`benchmarks.original`; `constraint` ties neighbouring or opposite knots together; below the decoder layer
`first_spline` they stay the identity, which is plain LoRA; `spline_lr_ratio`, `spline_lr` and `spline_hold` are read
by `benchmarks.runs`.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from torch import Tensor

from lslora import LSLoraConfig
from lslora.spline import splines_of

from .elsewhere import attach_deltas
from .forms import attach_forms
from .original import break_splines

NOT_OPTIONS = (
    "kind",
    "learns",
    "defects",
    "constraint",
    "first_spline",
    "spline_lr_ratio",
    "spline_lr",
    "spline_hold",
)


def odd(gradient: Tensor) -> Tensor:
    """Of a knot and the one opposite, the part that differs: φ(−t) = −φ(t), half the parameters."""
    return (gradient - gradient.flip(0)) / 2


def smooth(gradient: Tensor) -> Tensor:
    """A mean over each knot and two neighbours on either side, (1, 4, 6, 4, 1) / 16: knots move together."""
    weights = gradient.new_tensor([1, 4, 6, 4, 1]) / 16
    padded = torch.cat([gradient[:1].expand(2), gradient, gradient[-1:].expand(2)])
    return padded.unfold(0, 5, 1) @ weights


# On a spline's gradient; offsets start at zero, and Adam keeps to what is odd or equal among neighbours.
CONSTRAINTS = {"odd": odd, "smooth": smooth}
PLAIN = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
EVERYWHERE = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def attach(model: Any, method: dict[str, Any], r: int) -> Any:
    """A peft model with the method's adapter of rank `r + extra_rank` on every linear layer but the output's.

    `lora_alpha` is `alpha_ratio` r, 2 as in the reference recipe, whatever the extra rank (`hira` has none); no
    dropout, no bias.

    Raises:
        ValueError: `method` has a kind or an option that is not known, or a `spline_hold` without a spline.
    """
    options = {name: value for name, value in method.items() if name not in NOT_OPTIONS}
    kind = method["kind"]
    if kind == "hira":
        refuse(options, kind)
        return get_peft_model(model, HiraConfig(r=r, **EVERYWHERE))
    shared = {
        "r": r + options.pop("extra_rank", 0),
        "lora_alpha": options.pop("alpha_ratio", 2) * r,
        "lora_dropout": 0.0,
        **EVERYWHERE,
    }
    if "spline_hold" in method and kind != "lslora":
        raise ValueError(f"spline_hold is for the splines of lslora, got kind {kind!r}")
    if kind == "none":
        return model.requires_grad_(False)
    if kind in PLAIN:
        refuse(options, kind)
        return get_peft_model(model, LoraConfig(**shared, **PLAIN[kind]))
    if kind == "form":
        peft_model = get_peft_model(model, LoraConfig(**shared))
        attach_forms(peft_model, **options, learns=method.get("learns", ()))
        return peft_model
    if kind == "delta":
        peft_model = get_peft_model(model, LoraConfig(**shared))
        attach_deltas(peft_model, **options)
        return peft_model
    if kind != "lslora":
        raise ValueError(f"kind must be one of {('none', 'hira', *PLAIN, 'form', 'delta', 'lslora')}, got {kind!r}")
    peft_model = get_peft_model(model, LSLoraConfig(**shared, **options))
    break_splines(peft_model, **method.get("defects", {}))
    for spline in splines_of(peft_model):
        if "learns" in method:
            for name, parameter in spline.named_parameters():
                parameter.requires_grad_(name in method["learns"])
        if "constraint" in method:
            spline.weight.register_hook(CONSTRAINTS[method["constraint"]])
    if "first_spline" in method:
        for spline in splines_of(model.get_decoder().layers[: method["first_spline"]]):
            spline.requires_grad_(False)
    return peft_model


def refuse(options: dict[str, Any], kind: str) -> None:
    if options:
        raise ValueError(f"{kind} takes no options, got {sorted(options)}")
