"""A trained adapter as plain LoRA, for what knows no spline: the best linear update in the place of every layer's own.

What a layer adds, `u(x)`, is nonlinear in its input. Over calibration tokens, with features `f(x)` (`A x`, or `x`
where the rank may grow), the linear map of least mean squared error is

    W = (Σ u fᵀ)(Σ f fᵀ)⁺,    and of rank r at most    U Uᵀ W,

U the leading r left singular vectors of `W (Σ f fᵀ)^½` (reduced-rank regression, Izenman 1975, Journal of Multivariate
Analysis 5). With `f = A x` W is the new B beside the same A. Where every φ is linear, W is exact.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import Embedding
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from .config import LSLoraConfig
from .files import publish
from .layer import LSLoraLayer
from .placement import adapter

TOKENS_PER_FEATURE = 10  # fewer, and the fit would be to the noise of the calibration rows


class Moments:
    """Sums of one layer over the calibration tokens, in float64: what the fit and its error are made of.

    Args:
        start: The linear map that the fit starts from, (outputs, features) float64: what no token shows of W is
            taken from a multiple of it.
    """

    def __init__(self, start: Tensor) -> None:
        self.start = start
        self.ff = start.new_zeros(start.shape[1], start.shape[1])
        self.uf = torch.zeros_like(start)
        self.uu, self.tokens = 0.0, 0

    def add(self, f: Tensor, u: Tensor) -> None:
        """Features (…, features) and updates (…, outputs) of the same tokens."""
        f, u = f.flatten(0, -2).double(), u.flatten(0, -2).double()
        self.ff += f.T @ f
        self.uf += u.T @ f
        self.uu += u.square().sum().item()
        self.tokens += len(f)

    def fit(self) -> Tensor:
        """W, (outputs, features) float64.

        Raises:
            ValueError: there are fewer than ten tokens a feature.
        """
        features = len(self.ff)
        if self.tokens < TOKENS_PER_FEATURE * features:
            raise ValueError(
                f"calibration must have {TOKENS_PER_FEATURE} tokens a feature, "
                f"{TOKENS_PER_FEATURE * features} in all, got {self.tokens}"
            )
        spread = (self.start @ self.ff * self.start).sum().item()
        scale = (self.uf * self.start).sum().item() / spread if spread else 1.0
        rest = self.uf - scale * self.start @ self.ff
        return scale * self.start + rest @ torch.linalg.pinv(self.ff, hermitian=True)

    def leading(self, w: Tensor, rank: int) -> Tensor:
        """U, (outputs, at most rank), orthonormal columns."""
        values, vectors = torch.linalg.eigh(self.ff)
        return torch.linalg.svd(w @ vectors * values.clamp(min=0).sqrt(), full_matrices=False).U[:, :rank]

    def error(self, w: Tensor) -> float:
        """`sqrt(Σ |u − W f|² / Σ |u|²)`; 0 where nothing is added."""
        left = self.uu - 2 * (w * self.uf).sum().item() + (w @ self.ff * w).sum().item()
        return math.sqrt(max(left, 0.0) / self.uu) if self.uu else 0.0


@contextmanager
def observe_updates(
    model: PeftModel, adapter_name: str = "default", *, rank: int | None = None
) -> Iterator[dict[str, Moments]]:
    """Collect `Moments` of every layer's update during the forward passes inside the `with` block.

    Every position counts, so pass rows one by one or of equal length: padding would be fitted as well.

    Args:
        model: A model with an LS-LoRA adapter, in eval mode.
        adapter_name: The adapter that is active.
        rank: As for `export_lora`. Given, a layer's Σ f fᵀ has in² numbers of 8 bytes, otherwise r².

    Yields:
        Layer name → its moments, filled as the layers are called.

    Raises:
        ValueError: the model trains, the adapter is not the only active one or is no LS-LoRA adapter of placement
            output or bottleneck, it has `lora_bias` or adapts a convolution, or its rank is above `rank`.
    """
    layers = _layers(model, adapter_name, rank)
    if model.training or model.active_adapters != [adapter_name]:
        raise ValueError(
            f"the model must be in eval mode with {adapter_name!r} active alone, got training={model.training} and "
            f"{model.active_adapters}"
        )
    moments: dict[str, Moments] = {}

    def observe(name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            layer = _Layer(module, adapter_name, rank)
            with torch.no_grad():
                f, u = layer.features(args[0]), layer.update(args[0])
            if name not in moments:
                moments[name] = Moments(layer.start())
            moments[name].add(f, u)

        return hook

    handles = [module.register_forward_pre_hook(observe(name)) for name, module in layers.items()]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def export_lora(
    model: PeftModel,
    moments: dict[str, Moments],
    folder: str | Path,
    *,
    adapter_name: str = "default",
    rank: int | None = None,
    tolerance: float = 0.1,
) -> dict[str, float]:
    """Write the adapter as plain LoRA to `folder`: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        model: The model that `moments` come from.
        moments: What `observe_updates` yielded.
        folder: Made if need be.
        adapter_name: Which adapter.
        rank: Of the new adapter, at least that of the old one; by default the same, with the same A. More can follow
            what φ makes of x outside of A x. Give `observe_updates` the same.
        tolerance: ≥ 0, the largest error of a layer that is accepted, relative as in `Moments.error`.

    Returns:
        Layer name → relative error of its update over the calibration tokens.

    Raises:
        ValueError: as `observe_updates`; or `tolerance` is negative or NaN, a layer was not called or has too few
            tokens, or its error is above `tolerance`. Nothing is written then.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    layers = _layers(model, adapter_name, rank)
    if missing := [name for name in layers if name not in moments]:
        raise ValueError(f"every adapted layer must be called during calibration; {missing[0]} was not")
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tensors = {key: tensor for key, tensor in tensors.items() if ".lora_spline." not in key}
    errors: dict[str, float] = {}
    for name, module in layers.items():
        layer = _Layer(module, adapter_name, rank)
        a, b, errors[name] = layer.linear(moments[name])
        for key, matrix in zip(layer.keys(name), (a, b), strict=True):
            tensors[key] = matrix.to(tensors[key].dtype)
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst] <= tolerance:
        raise ValueError(
            f"the linear updates must be within {tolerance:.3g} of the trained ones, relative; that of {worst} is "
            f"{errors[worst]:.3g} away: serve the adapter with lslora, or accept a larger tolerance"
        )
    _write(Path(folder), _plain_config(model.peft_config[adapter_name], rank), tensors)
    return errors


class _Layer:
    """One adapted layer, and how its update is described linearly; `rank` as for `export_lora`."""

    def __init__(self, module: Any, name: str, rank: int | None) -> None:
        self.module, self.name, self.rank = module, name, rank
        self.is_embedding = isinstance(module, Embedding)
        self.a = module.lora_embedding_A[name] if self.is_embedding else module.lora_A[name].weight
        self.b = module.lora_embedding_B[name] if self.is_embedding else module.lora_B[name].weight
        scale = module._get_embed_scale() if self.is_embedding else None
        self.outer = 1.0 if scale is None else float(scale)  # what the base layer multiplies its vectors with
        # With A x as features A stays; x is needed where it may change, but an embedding's x is a number.
        self.on_x = rank is not None and not self.is_embedding

    def features(self, x: Tensor) -> Tensor:
        x = x if self.is_embedding else x.to(self.a.dtype)
        return x if self.on_x else adapter(self.module, self.name).A(x)

    def update(self, x: Tensor) -> Tensor:
        x = x if self.is_embedding else x.to(self.a.dtype)
        shape = x.shape if self.is_embedding else x.shape[:-1]
        nothing = torch.zeros(*shape, len(self.b), dtype=torch.float32, device=x.device)
        return self.module.lora_variant[self.name].forward(self.module, self.name, x, nothing)

    def start(self) -> Tensor:
        """The update without its spline, (outputs, features)."""
        b = self.outer * self.module.scaling[self.name] * self.b.detach().double()
        return b @ self.a.detach().double() if self.on_x else b

    def linear(self, moments: Moments) -> tuple[Tensor, Tensor, float]:
        """A (rank, in) and B (out, rank) of plain LoRA, and the relative error of its update."""
        w = moments.fit()
        scaling = self.module.scaling[self.name] if self.rank is None else 1.0  # r / r, see _plain_config
        if self.rank is None or self.is_embedding:
            a, b = self.a.detach().double(), w / (scaling * self.outer)
        else:
            b = moments.leading(w, self.rank)
            a = b.T @ w
            w = b @ a
        more = 0 if self.rank is None else self.rank - len(a)
        return pad(a, (0, 0, 0, more)), pad(b, (0, more)), moments.error(w)

    def keys(self, name: str) -> tuple[str, str]:
        """Where A and B stand in the state dict."""
        if self.is_embedding:
            return f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"
        return f"{name}.lora_A.weight", f"{name}.lora_B.weight"


def _layers(model: PeftModel, adapter_name: str, rank: int | None) -> dict[str, Any]:
    """The layers of an adapter that can be exported; otherwise ValueError, as `observe_updates` has it."""
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, LSLoraConfig):
        raise ValueError(f"{adapter_name!r} must be an LS-LoRA adapter, got {type(config).__name__}")
    if config.placement == "weight":
        raise ValueError("placement='weight' is exact without a fit: merge_and_unload, or peft.convert_to_lora")
    if config.lora_bias:
        raise ValueError("lora_bias must be False: what serves plain LoRA knows no bias beside it")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LSLoraLayer) and adapter_name in module.lora_spline
    }
    for name, module in layers.items():
        if isinstance(module.get_base_layer(), (nn.Conv1d, nn.Conv2d, nn.Conv3d)):  # type: ignore[attr-defined]
            raise ValueError(f"only linear layers and embeddings can be exported; {name} is a convolution")
        if rank is not None and module.r[adapter_name] > rank:  # type: ignore[attr-defined]
            raise ValueError(f"rank must be at least the adapter's, {module.r[adapter_name]}, got {rank}")  # type: ignore[attr-defined]
    return layers


def _plain_config(config: LSLoraConfig, rank: int | None) -> LoraConfig:
    """The same adapter without splines; of a new rank, every layer has the scaling 1."""
    names = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
    settings = {name: getattr(config, name) for name in names - {"peft_type", "eva_config"}}
    settings |= {"init_lora_weights": True, "inference_mode": True}
    if rank is not None:
        settings |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return LoraConfig(**settings)


def _write(folder: Path, config: LoraConfig, tensors: dict[str, Tensor]) -> None:
    """Both files, each whole or not at all."""
    stage = folder / ".part"
    stage.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(stage)
    # Cloned, since tied layers have tensors in common, which the file's format has not.
    contiguous = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_file(contiguous, stage / "adapter_model.safetensors", metadata={"format": "pt"})
    publish(stage, folder)
