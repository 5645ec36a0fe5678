"""LSLoraConfig: the settings of an LS-LoRA adapter, their defaults and all of their validation."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

from peft import LoraConfig, PeftType

from .config_file import brief
from .ops.spline import EXTRAPOLATIONS, INTERPOLATION_METHODS

PLACEMENTS = ("output", "bottleneck", "weight")

# Initialisations that draw A and B without touching the base weight. The others (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ,
# …) subtract a linear update from it, which only a linear update can give back.
INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")

# Limits for configs that others wrote: generous, and far below what would fill a memory or overflow fp32.
MAX_RANK = 2**16  # above the width of nearly every layer, where a higher rank adds nothing
MAX_KNOTS = 2**12  # soft interpolation takes that many times the memory of what it is applied to
MAX_NUMBER = 1e30  # fp32 ends at 3e38
MAX_REPLICATED_LAYERS = 2**10
SOFT_TEMPERATURES = (1e-6, 1e6)
LEAST_SPACING = 1e-30
FP32_STEPS = 2**-20  # of a position: nearer knots are too near for fp32, whose numbers are 2**-23 apart

RECOMMENDED = {
    "num_knots": 9,
    "calibration_steps": 100,
    "extrapolation": "linear",
    "learn_scales": False,
}


@dataclass
class LSLoraConfig(LoraConfig):
    """Settings of an LS-LoRA adapter: those of `peft.LoraConfig` and the spline's.

    The adapted layer computes `W0 x + b + output_scale · φ(input_scale · clamp(scaling · B A x, k_min, k_max))` with
    one learnable piecewise linear φ per layer that starts as the identity, i.e. as plain LoRA (README, "Method").

    Args:
        placement: What φ, with its scales and the clamp, is applied to: `"output"`, the update (`φ(s B A x)`);
            `"bottleneck"`, its r inner numbers (`s B φ(A x)`); `"weight"`, the update's weight (`φ(s B A) x`), which
            can be merged into the base weight. The grid is in the unit of what φ is applied to.
        num_knots: Number of knots of φ, 2 to 4,096. A layer gets `num_knots + 2` parameters on top of LoRA's.
        k_min: Position of the first knot, ≤ 0 ≤ k_max with `extrapolation="clamp"`.
        k_max: Position of the last knot, `> k_min`; the knots lie evenly spaced between the two, at a distance that
            fp32 can tell.
        learn_scales: Whether `input_scale` and `output_scale` are learned; else both are 1, and a layer gets
            `num_knots` parameters.
        calibration_steps: ≥ 0. With 0 the grid stays at [k_min, k_max]. Otherwise it is stretched, for each layer, so
            that its farther end lies at the 99 % quantile of |z| in the last of so many optimizer steps, during which
            the layer is plain LoRA; then it is kept and saved. `k_min` and `k_max` then give its proportions only.
        spline_reg_weight: ≥ 0. The penalty `spline_reg_weight · Σ_layers mean_i (v_i − k_i)²`, summed over layers,
            pulls the knot heights towards the identity. Its gradient reaches every optimizer step (see
            `lslora.penalty`); it is no part of the reported loss.
        interpolation_method: `"piecewise"` (straight lines between neighbouring knots) or `"soft"` (softmax weights
            over all knots).
        extrapolation: Beyond the end knots φ holds (`"clamp"`) or its end segments go on (`"linear"`).
        soft_temperature: Width of the soft weights, in units of the knot spacing, 1e-6 to 1e6; read by `"soft"` only.

    Every number must lie within ±1e30, so that fp32 holds what is computed from it, and every rank within 1 to 65,536:
    a config may come from anyone, and these limits keep it from filling the memory.

    Raises:
        ValueError: a value is out of its range, or an option of `LoraConfig` that assumes a linear update is set.
        TypeError: a value has the wrong type.
    """

    placement: Literal["output", "bottleneck", "weight"] = field(
        default="output", metadata={"help": "Where in the update the spline sits."}
    )
    num_knots: int = field(default=5, metadata={"help": "Number of knots of the spline, at least 2."})
    k_min: float = field(default=-3.0, metadata={"help": "Position of the first knot."})
    k_max: float = field(default=3.0, metadata={"help": "Position of the last knot, greater than k_min."})
    learn_scales: bool = field(
        default=True, metadata={"help": "Whether the spline's input scale and output scale are learned, or 1."}
    )
    calibration_steps: int = field(
        default=0, metadata={"help": "Optimizer steps over which each layer's grid is measured; 0 for a fixed grid."}
    )
    spline_reg_weight: float = field(
        default=0.01, metadata={"help": "Weight of the penalty on the knot heights' distance from the identity."}
    )
    interpolation_method: Literal["piecewise", "soft"] = field(
        default="piecewise", metadata={"help": "How the spline interpolates between its knots."}
    )
    extrapolation: Literal["clamp", "linear"] = field(
        default="clamp", metadata={"help": "How the spline goes on beyond its end knots."}
    )
    soft_temperature: float = field(
        default=0.5, metadata={"help": "Width of the soft weights in units of the knot spacing (soft only)."}
    )

    @classmethod
    def recommended(cls, **overrides: Any) -> LSLoraConfig:
        """The settings that did best on validation rows, with `overrides` on top.

        benchmarks/LOG.md says how they were found, and README.md what they gain over LoRA: a little where a part of a
        model's layers is adapted, hardly anything where all are. They go with a learning rate of the splines of
        0.05, whatever that of A and B (`lslora.training.RECOMMENDED_SPLINE_LR`), and with `calibration_steps` at a
        third of the run's steps: set it. `lora_alpha` is 10 r unless given; tune it with LoRA's rate (at r = 4 the
        spline gains most on 40 r, which is good for LoRA on some data and not on other).
        """
        settings: dict[str, Any] = {**RECOMMENDED, **overrides}
        settings.setdefault("lora_alpha", 10 * settings.get("r", LoraConfig().r))
        return cls(**settings)

    def __post_init__(self) -> None:
        self._check_initialisation()  # before peft clears what it will not read
        super().__post_init__()
        self.peft_type = PeftType("LSLORA")
        self._check_lora()
        self._check_names()
        self._check_spline()
        self._check_lora_options()

    def _check_lora(self) -> None:
        """The numbers and names of `LoraConfig`, most of which peft takes as they are."""
        for name, ranks in (("r", [self.r]), ("rank_pattern", _values("rank_pattern", self.rank_pattern))):
            for rank in ranks:
                _check_int(name, rank, 1, MAX_RANK)
        for name, alphas in (
            ("lora_alpha", [self.lora_alpha]),
            ("alpha_pattern", _values("alpha_pattern", self.alpha_pattern)),
        ):
            for alpha in alphas:
                _check_number(name, alpha)
        _check_number("lora_dropout", self.lora_dropout)
        if not 0 <= self.lora_dropout <= 1:
            raise ValueError(f"lora_dropout must be within 0 and 1, got {self.lora_dropout}")
        tokens = self.trainable_token_indices or []
        for token in chain.from_iterable(tokens.values()) if isinstance(tokens, dict) else tokens:
            _check_int("trainable_token_indices", token, 0)
        replicated = 0
        for start, end in self.layer_replication or ():
            if not 0 <= start < end:
                raise ValueError(f"layer_replication must hold pairs with 0 ≤ start < end, got {[start, end]}")
            replicated += end - start
        if replicated > MAX_REPLICATED_LAYERS:
            raise ValueError(
                f"layer_replication must give at most {MAX_REPLICATED_LAYERS} layers, got {brief(replicated)}"
            )

    def _check_names(self) -> None:
        """Names of modules are no paths, and what peft takes for a regular expression is one."""
        literal = ("target_modules", "exclude_modules", "modules_to_save")
        for option in (*literal, "layers_pattern", "rank_pattern", "alpha_pattern"):
            value = getattr(self, option)
            if not isinstance(value, str | Iterable | None):
                raise TypeError(f"{option} must be names of modules, got {brief(value)}")
            for name in [value] if isinstance(value, str) else value or ():
                if not isinstance(name, str) or any(char == "/" or ord(char) < 32 for char in name):
                    raise ValueError(f"{option} must hold names of modules, got {brief(name)}")
                if option in literal and not isinstance(value, str):
                    continue
                try:
                    re.compile(name)
                except (re.error, OverflowError, RecursionError) as error:
                    raise ValueError(f"{option} must be a regular expression, got {brief(name)}: {error}") from error

    def _check_spline(self) -> None:
        _check_int("num_knots", self.num_knots, 2, MAX_KNOTS)
        _check_int("calibration_steps", self.calibration_steps, 0)
        for name in ("k_min", "k_max", "spline_reg_weight", "soft_temperature"):
            _check_number(name, getattr(self, name))
        if not isinstance(self.learn_scales, bool):
            raise TypeError(f"learn_scales must be True or False, got {self.learn_scales!r}")
        if self.k_min >= self.k_max:
            raise ValueError(f"k_min must be smaller than k_max, got k_min={self.k_min} and k_max={self.k_max}")
        spacing = (self.k_max - self.k_min) / (self.num_knots - 1)
        if spacing < max(LEAST_SPACING, FP32_STEPS * max(abs(self.k_min), abs(self.k_max))):
            raise ValueError(
                f"k_min and k_max must be so far apart that fp32 can tell {self.num_knots} knots between them, "
                f"got {self.k_min} and {self.k_max}"
            )
        if self.extrapolation == "clamp" and not self.k_min <= 0 <= self.k_max:
            raise ValueError(
                "with extrapolation='clamp' 0 must lie within k_min and k_max, or an update of 0 would not stay 0, "
                f"got {self.k_min} and {self.k_max}"
            )
        if self.spline_reg_weight < 0:
            raise ValueError(f"spline_reg_weight must not be negative, got {self.spline_reg_weight}")
        if not SOFT_TEMPERATURES[0] <= self.soft_temperature <= SOFT_TEMPERATURES[1]:
            raise ValueError(f"soft_temperature must be within {SOFT_TEMPERATURES}, got {self.soft_temperature}")
        if self.interpolation_method not in INTERPOLATION_METHODS:
            raise ValueError(
                f"interpolation_method must be one of {INTERPOLATION_METHODS}, got {self.interpolation_method!r}"
            )
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {PLACEMENTS}, got {self.placement!r}")
        if self.extrapolation not in EXTRAPOLATIONS:
            raise ValueError(f"extrapolation must be one of {EXTRAPOLATIONS}, got {self.extrapolation!r}")

    def _check_initialisation(self) -> None:
        """Refuse initialisations that need a linear update, and settings of those that were not chosen."""
        if self.init_lora_weights not in INITIALISATIONS:
            raise ValueError(
                f"init_lora_weights must be one of {INITIALISATIONS} (other initialisations change the base weight "
                f"and assume a linear update), got {self.init_lora_weights!r}"
            )
        for init, option in (("loftq", "loftq_config"), ("corda", "corda_config"), ("lora_ga", "lora_ga_config")):
            if getattr(self, option):
                raise ValueError(f"{option} belongs to init_lora_weights={init!r}, which LS-LoRA does not support")
        if self.eva_config is not None and self.init_lora_weights != "eva":
            raise ValueError(f"eva_config needs init_lora_weights='eva', got {self.init_lora_weights!r}")

    def _check_lora_options(self) -> None:
        """Refuse what would be accepted and then ignored, or what needs a linear update."""
        for option in dataclasses.fields(self):
            if option.metadata.get("is_lora_variant") and getattr(self, option.name):
                raise ValueError(f"{option.name} is a LoRA variant of its own and does not combine with LS-LoRA")
        if self.runtime_config.ephemeral_gpu_offload:
            raise ValueError("ephemeral_gpu_offload is for DoRA, which does not combine with LS-LoRA")
        if self.target_parameters:
            raise ValueError("target_parameters merges the update into the parameter, which LS-LoRA cannot do")
        if self.lora_bias and self.placement == "weight":
            raise ValueError("lora_bias needs B as a layer of its own, which placement='weight' does not run")
        if self.use_qalora:
            raise ValueError("use_qalora is a LoRA variant of its own and does not combine with LS-LoRA")
        if self.megatron_config:
            raise ValueError("megatron_config is not supported: Megatron layers would drop the spline")


def _check_int(name: str, value: object, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {brief(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {brief(value)}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, got {brief(value)}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {brief(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if abs(value) > MAX_NUMBER:
        raise ValueError(f"{name} must be within ±{MAX_NUMBER:g}, got {brief(value)}")


def _values(name: str, pattern: object) -> list[Any]:
    if not isinstance(pattern, dict):
        raise TypeError(f"{name} must be a dict, got {brief(pattern)}")
    return list(pattern.values())
