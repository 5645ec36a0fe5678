"""What a trainer needs for splines: an optimizer group of their own and their state in the log.

The penalty needs nothing here: it reaches every optimizer by itself, see `lslora.penalty`.
"""

from __future__ import annotations

from inspect import unwrap
from itertools import compress
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from .calibration import count_step
from .diagnostics import spline_metrics
from .failures import all_finite, failure
from .layer import LSLoraLayer
from .spline import Spline, splines_of

# The splines' learning rate that goes with `LSLoraConfig.recommended`, whatever that of A and B: a knot is measured in
# units of the grid (benchmarks/LOG.md).
RECOMMENDED_SPLINE_LR = 0.05

# What the splines' group has of its own, or gets from a scheduler.
NOT_SHARED = {"params", "param_names", "weight_decay", "initial_lr"}


def separate_spline_group(optimizer: Optimizer, model: nn.Module, *, lr: float | None = None) -> None:
    """Move the trainable spline parameters of `model` into a group of their own at the end of `optimizer`'s groups.

    The group has no weight decay; everything else it has of the group that the parameters came from. Call it before a
    learning rate scheduler is made, so that the scheduler sees the group.

    Args:
        optimizer: Any torch optimizer over the parameters of `model`, before its first step.
        model: A model with LS-LoRA adapters; without any, nothing changes.
        lr: The splines' learning rate, > 0; None for that of A and B, as in the reference recipe, where 500 Adam steps
            at 2e-4 move a knot by 0.1 at most. `RECOMMENDED_SPLINE_LR` lets the splines take shape.

    Raises:
        ValueError: `lr` is not positive, spline parameters come from groups of different settings, or the optimizer
            finds its learning rate by itself (`lr=None`).
    """
    if lr is not None and not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
    ids = _trained(model)
    sources = [group for group in optimizer.param_groups if any(id(p) in ids for p in group["params"])]
    if not sources:
        return
    settings = [{name: value for name, value in group.items() if name not in NOT_SHARED} for group in sources]
    for name in settings[0]:
        if any(found.get(name) != settings[0][name] for found in settings):
            values = [found.get(name) for found in settings]
            raise ValueError(f"spline parameters must come from groups of one {name}, got {values}")
    rate = settings[0]["lr"]
    if rate is None:
        raise ValueError("an optimizer must have a learning rate, beside which the splines get theirs, got lr=None")
    moved: dict[str, Any] = {**settings[0], "lr": rate if lr is None else lr, "weight_decay": 0.0}
    for group in sources:
        mine = [id(p) in ids for p in group["params"]]
        for entries in group.keys() & {"params", "param_names"}:
            moved[entries] = [*moved.get(entries, ()), *compress(group[entries], mine)]
            group[entries] = [entry for entry, is_mine in zip(group[entries], mine, strict=True) if not is_mine]
    optimizer.add_param_group(moved)


def _trained(model: nn.Module) -> set[int]:
    """The identities of the spline parameters that learn."""
    return {id(p) for spline in splines_of(model) for p in spline.parameters() if p.requires_grad}


def _is_mixed(groups: list[dict[str, Any]], ids: set[int]) -> bool:
    """Whether a group holds parameters of `ids` and others."""
    return any(len({id(p) in ids for p in group["params"]}) > 1 for group in groups)


def prepare_for_deepspeed(model: nn.Module, *, gradient_accumulation_steps: int = 1) -> None:
    """Let the penalty and the calibration reach the splines of `model` under DeepSpeed; before its `initialize`.

    Its optimizers step parameters of their own making, where neither finds the splines. From here on every backward
    pass adds its share of the penalty's gradient, which gradient clipping then sees as well; the calibration needs a
    call of `lslora.calibration.count_step` after every step. `SplineTrainerMixin` does both.

    Args:
        model: A model with LS-LoRA adapters; without any, nothing changes.
        gradient_accumulation_steps: ≥ 1, backward passes in a step.

    Raises:
        ValueError: `gradient_accumulation_steps` is below 1.
    """
    if gradient_accumulation_steps < 1:
        raise ValueError(f"gradient_accumulation_steps must be at least 1, got {gradient_accumulation_steps}")
    for spline in splines_of(model):
        spline.micro_batches = gradient_accumulation_steps


class SplineTrainerMixin:
    """Gives `transformers.Trainer`, and every trainer built on it, the spline's optimizer group and log entries.

    A loss or a gradient that is not finite stops the training before it reaches the weights.

    Put it in front of the trainer's class:

        class SplineSFTTrainer(SplineTrainerMixin, SFTTrainer): ...
        SplineSFTTrainer(model, args=..., spline_lr=0.05)

    Args:
        spline_lr: Learning rate of the splines, > 0, which follows the schedule as that of A and B does; None for that
            of A and B. Where the trainer is given an optimizer together with its scheduler, that has the splines in
            groups of their own, at rates of their own.

    Raises:
        FloatingPointError: in training, when the loss or a gradient is not finite; it names the step, the layer where
            that begins and its spline's state.
        ValueError: `spline_lr` is not positive, DeepSpeed is set to its own optimizer or to fp16, the optimizer is
            a layer-wise one or LOMO, or the trainer is given an optimizer and a scheduler that know of no group for
            the splines.
    """

    def __init__(self, *args: Any, spline_lr: float | None = None, **kwargs: Any) -> None:
        if spline_lr is not None and not spline_lr > 0:
            raise ValueError(f"spline_lr must be positive, got {spline_lr}")
        self.spline_lr = spline_lr
        self._separated: Optimizer | None = None
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled:  # type: ignore[attr-defined]
            _check_deepspeed(self.args.hf_deepspeed_config.config)  # type: ignore[attr-defined]
            steps = self.args.gradient_accumulation_steps  # type: ignore[attr-defined]
            prepare_for_deepspeed(self.model, gradient_accumulation_steps=steps)  # type: ignore[attr-defined]
            self.add_callback(_StepCounter)  # type: ignore[attr-defined]
        _complete_reference(self.model)  # type: ignore[attr-defined]

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, which asks its reference within its own `__init__` (`precompute_ref_log_probs`)."""
        _complete_reference(self.model)  # type: ignore[attr-defined]
        return super()._precompute_ref_logps(*args, **kwargs)  # type: ignore[misc]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """The trainer's own optimizer, with the splines in a group of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        # Asked again, as after a training, the trainer hands out the optimizer that it has, by then in a wrapper.
        inner = getattr(optimizer, "optimizer", optimizer)
        if inner is self._separated:
            return optimizer
        has_step = unwrap(type(inner).step) is not unwrap(Optimizer.step)  # torch puts its hooks around it
        if isinstance(inner, LayerWiseDummyOptimizer) or not has_step:
            raise ValueError(
                "an optimizer that takes its steps within the backward pass (LOMO, optim='..._layerwise') passes by "
                "the splines' learning rate, the check of the gradients, and without a step of its own the penalty "
                "and the calibration: take another one, or the same without _layerwise"
            )
        model, scheduler = self.model, self.lr_scheduler  # type: ignore[attr-defined]
        if scheduler is None:
            separate_spline_group(optimizer, model, lr=self.spline_lr)
        elif _is_mixed(inner.param_groups, _trained(model)):
            raise ValueError(
                "an optimizer that comes with a scheduler must have the splines in groups of their own: call "
                "lslora.training.separate_spline_group before the scheduler is made"
            )
        self._separated = inner
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's own; FloatingPointError before the step where the loss or a gradient is not finite."""
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        state, accelerator = self.state, self.accelerator  # type: ignore[attr-defined]
        # fp16's loss scaling meets gradients that are not finite, and passes over them.
        whole = accelerator.sync_gradients and accelerator.scaler is None
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None] if whole else []  # type: ignore[attr-defined]
        if not all_finite(loss, gradients):
            raise failure(self.model, inputs, loss, state.global_step + 1)  # type: ignore[attr-defined]
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the splines' state to the training logs, and so to every tracker that reads them."""
        if "loss" in logs:
            logs.update(spline_metrics(self.model))  # type: ignore[attr-defined]
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def _check_deepspeed(config: dict[str, Any]) -> None:
    """Raise ValueError for settings of DeepSpeed that would step the splines otherwise than asked for."""
    if "optimizer" in config:
        raise ValueError(
            "the DeepSpeed configuration must have no optimizer, which would step the splines as it steps A and B: "
            f"choose it with the trainer's `optim`; got {config['optimizer']}"
        )
    if config.get("fp16", {}).get("enabled") not in (None, False):
        raise ValueError(
            "under DeepSpeed LS-LoRA supports bf16 and fp32; the loss scaling of fp16 would hide the penalty"
        )


class _StepCounter(TrainerCallback):
    """Tells the calibration of every optimizer step."""

    def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        count_step(splines_of(model))


def _complete_reference(model: nn.Module) -> None:
    """Copy the grids to the adapter `ref`, TRL's frozen copy of `default`, which it makes of parameters alone."""
    for layer in (module for module in model.modules() if isinstance(module, LSLoraLayer)):
        if {"default", "ref"} <= layer.lora_spline.keys():
            ours, copy = (cast(Spline, layer.lora_spline[name]) for name in ("default", "ref"))
            if ours.is_calibrated and not copy.is_calibrated:
                copy.load_state_dict({**copy.state_dict(), "grid_scale": ours.grid_scale})
