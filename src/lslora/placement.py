"""Where in LoRA's update the spline sits: one class for each placement, called by peft's layers for the plain update.

Each adds its update to the base layer's `result` and returns that in the dtype of `result`. A, B are the adapter's
weights, `s` its scaling, φ its spline with both scales, `x` (…, in) with dropout applied. For an embedding `A x` is a
column of A for every token, and the update is scaled as the base layer scales its vectors (Gemma's do). With `s = 0`
there is no update, whatever φ(0) has become; any other `s` that an adapter is given after its training goes into φ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Embedding, Linear, LoraVariant
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules import module as everywhere

from .config import LSLoraConfig
from .spline import Spline


class SplineVariant(LoraVariant):
    """What the placements share: making the spline beside A and B."""

    mergeable = False

    def supports_lora_conversion(self) -> bool:
        return self.mergeable

    @staticmethod
    def init(module: Any, adapter_name: str, config: LSLoraConfig, **kwargs: Any) -> None:
        module.lora_spline[adapter_name] = Spline(config)
        # peft has moved A and B by now; the spline follows them.
        module._move_adapter_to_device_of_base_layer(adapter_name)


class OutputVariant(SplineVariant):
    """`W0 x + φ(s B A x)`: elementwise on tokens × out."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        a = adapter(module, active_adapter)
        if is_off(a.scaling):
            return result
        h, weight = a.A(x), _weight_alone(a.B)
        if weight is not None and _is_plain(a.spline, Spline):
            updated = a.spline.update(result, h, weight, a.scaling)
            if updated is not None:
                return updated
        update = a.spline(a.B(h) * a.scaling)
        return (result + _as_base(module, update)).to(result.dtype)


def whole_layer(module: Any, x: Tensor) -> Tensor | None:
    """The output of a layer of which base and adapter can be computed at once; None where that takes several calls.

    That is a frozen `nn.Linear` with one active adapter, its spline on the output.
    """
    names = module.active_adapters
    if not isinstance(module, Linear) or module.disable_adapters or module.merged or len(names) != 1:
        return None
    (name,), parts = names, module._modules  # straight from where modules keep them: every layer pays for this
    base = parts["base_layer"]
    if type(module.lora_variant.get(name)) is not OutputVariant or not _is_plain(base, nn.Linear):
        return None
    spline, dropout = parts["lora_spline"][name], parts["lora_dropout"][name]
    a, b, scaling = _weight_alone(parts["lora_A"][name]), _weight_alone(parts["lora_B"][name]), module.scaling[name]
    if a is None or b is None or is_off(scaling) or not _is_plain(spline, Spline):
        return None
    return spline.adapted_linear(x, base, dropout, a, b, scaling)


class BottleneckVariant(SplineVariant):
    """`W0 x + s B φ(A x)`: elementwise on tokens × r, next to nothing."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        a = adapter(module, active_adapter)
        update = a.B(a.spline(a.A(x))) * a.scaling
        return (result + _as_base(module, update)).to(result.dtype)


class WeightVariant(SplineVariant):
    """`W0 x + φ(s B A) x`: elementwise on out × in, linear in x, so it merges into the base weight."""

    mergeable = True

    @staticmethod
    def init(module: Any, adapter_name: str, config: LSLoraConfig, **kwargs: Any) -> None:
        if isinstance(module.get_base_layer(), CONVOLUTIONS):
            raise ValueError(NO_CONVOLUTIONS)
        SplineVariant.init(module, adapter_name, config)

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        if is_off(module.scaling[active_adapter]):
            return result
        if isinstance(module, Embedding):
            update = _as_base(module, module._embed(x, module.get_delta_weight(active_adapter)))
        else:
            product = _product(module.lora_A[active_adapter], module.lora_B[active_adapter], x)
            delta = module.lora_spline[active_adapter](product * module.scaling[active_adapter])
            update = linear(module.lora_dropout[active_adapter](x), delta)
        return (result + update).to(result.dtype)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + _delta(module, active_adapter, orig_weight)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += _delta(module, active_adapter, orig_weight)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - _delta(module, active_adapter, orig_weight)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NO_CONVOLUTIONS = "placement='weight' does not support convolutions"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
HOOKS_ON_ALL = tuple(getattr(everywhere, f"_global{hooks}") for hooks in HOOKS)
VARIANTS = {"output": OutputVariant, "bottleneck": BottleneckVariant, "weight": WeightVariant}


def is_off(scaling: float | Tensor) -> bool:
    """Whether an adapter was switched off by a scale of 0; a tensor is a scale that compiled code must not ask for."""
    return not isinstance(scaling, Tensor) and scaling == 0


def _delta(module: Any, name: str, like: Tensor) -> Tensor:
    """What merging adds, in the dtype of the weight it goes to."""
    if not like.is_floating_point():
        raise ValueError(f"merging needs a floating-point base weight, got {like.dtype}")
    return module.get_delta_weight(name).to(like.dtype)


def _product(a: Any, b: Any, x: Tensor) -> Tensor:
    """`B A`, (out, in), for an x (…, in)."""
    if _is_plain(a, nn.Linear) and _is_plain(b, nn.Linear):
        return b.weight @ a.weight
    # Engines that shard or offload parameters have them whole in the forward pass of their own module alone.
    return b(a(torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))).T


class Adapter(NamedTuple):
    """One adapter of a layer as functions: `A` (…, in) → (…, r) after dropout, `B` (…, r) → (…, out)."""

    A: Callable[[Tensor], Tensor]
    B: Callable[[Tensor], Tensor]
    scaling: float
    spline: Spline


def adapter(module: Any, name: str) -> Adapter:
    """The adapter of this name; `A` of an embedding takes token numbers (…) instead, and has no dropout."""
    scaling, spline = module.scaling[name], module.lora_spline[name]
    if isinstance(module, Embedding):
        weight_a, weight_b = module.lora_embedding_A[name], module.lora_embedding_B[name]
        tensor_parallel = module.input_fns.get(name), module.output_fns.get(name)
        return Adapter(
            lambda x: module._embed(x, weight_a.T, *tensor_parallel), lambda h: h @ weight_b.T, scaling, spline
        )
    dropout, a = module.lora_dropout[name], module.lora_A[name]
    return Adapter(lambda x: a(dropout(x)), module.lora_B[name], scaling, spline)


def _weight_alone(b: Any) -> Tensor | None:
    """The matrix that multiplying with is all that calling `b` does, or None."""
    if not _is_plain(b, nn.Linear):
        return None
    parameters = b._parameters
    return parameters["weight"] if parameters["bias"] is None else None


def _is_plain(module: Any, cls: type[nn.Module]) -> bool:
    """Whether calling the module does what its class does and nothing else.

    Wrappers do more, and hooks (sharding engines gather parameters in them), and a forward put in the class's place.
    """
    own = vars(module)
    if type(module) is not cls or "forward" in own or any(HOOKS_ON_ALL):
        return False
    return not any(map(own.__getitem__, HOOKS))


def _as_base(module: Any, update: Tensor) -> Tensor:
    """The update as the base layer would scale it."""
    scale = module._get_embed_scale() if isinstance(module, Embedding) else None
    return update if scale is None else update * scale.to(update.dtype)
