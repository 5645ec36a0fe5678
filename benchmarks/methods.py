"""Methods to compare, by name and options: each makes an adapter on a model, and says what of it learns.

`lora`, `dora`, `rslora` are peft's own. `lslora` takes the options of `LSLoraConfig`, `form` those of
`benchmarks.forms.attach_forms`. Some controls are LS-LoRA with most of it frozen: `learns` names what of the spline is
trained (`weight`, `input_scale_offset`, `output_scale_offset`); `defects` are those of `benchmarks.original`.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, get_peft_model

from lslora import LSLoraConfig, Spline

from .forms import attach_forms
from .original import break_splines

NOT_OPTIONS = ("kind", "learns", "defects", "spline_lr_ratio")
PLAIN = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


def attach(model: Any, method: dict[str, Any], r: int) -> Any:
    """A peft model with the method's adapter of rank `r + extra_rank` on every linear layer but the output's.

    `lora_alpha` is `alpha_ratio` r, 2 as in the reference recipe, whatever the extra rank; no dropout, no bias.

    Raises:
        ValueError: `method` has a kind or an option that is not known.
    """
    options = {name: value for name, value in method.items() if name not in NOT_OPTIONS}
    shared = {
        "r": r + options.pop("extra_rank", 0),
        "lora_alpha": options.pop("alpha_ratio", 2) * r,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    kind = method["kind"]
    if kind in PLAIN:
        if options:
            raise ValueError(f"{kind} takes no options, got {sorted(options)}")
        return get_peft_model(model, LoraConfig(**shared, **PLAIN[kind]))
    if kind == "form":
        peft_model = get_peft_model(model, LoraConfig(**shared))
        attach_forms(peft_model, **options, learns=method.get("learns", ()))
        return peft_model
    if kind != "lslora":
        raise ValueError(f"kind must be one of {(*PLAIN, 'lslora')}, got {kind!r}")
    peft_model = get_peft_model(model, LSLoraConfig(**shared, **options))
    break_splines(peft_model, **method.get("defects", {}))
    if "learns" in method:
        for spline in (m for m in peft_model.modules() if isinstance(m, Spline)):
            for name, parameter in spline.named_parameters():
                parameter.requires_grad_(name in method["learns"])
    return peft_model
