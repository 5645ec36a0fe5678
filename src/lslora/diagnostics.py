"""What the splines of a model look like: model → records, which `lslora.records` describes and puts into words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from .records import Record, mean_metrics
from .spline import Spline, whole

STORED = ("weight", "input_scale_offset", "output_scale_offset", "grid_scale")  # of a spline
BINS = 48


def spline_records(
    model: nn.Module, adapter_name: str = "default", occupancy: Occupancy | None = None
) -> list[Record]:
    """One record for every layer that has a spline of this adapter, in the model's order.

    Args:
        model: A model with LS-LoRA adapters.
        adapter_name: Which adapter.
        occupancy: What `observe_occupancy` of the same model and adapter yielded, for the records' `occupancy`.

    Raises:
        ValueError: the model has no spline of this name.
    """
    splines = _named_splines(model, adapter_name)
    if not splines:
        raise ValueError(f"model must have LS-LoRA layers with an adapter named {adapter_name!r}, found none")
    records = _records(model, splines)
    for record in records:
        if occupancy and (shares := occupancy.shares(record["layer"])):
            record["occupancy"] = _per_interval(shares, len(record["grid"]) - 1)
            record["density"] = shares[1:-1]
    return records


def spline_metrics(model: nn.Module) -> dict[str, float]:
    """Averages over the layers' active splines, as `spline/<key>`, for a training log; empty without splines.

    Under FSDP every process must call it: the parameters are gathered.
    """
    return mean_metrics(trained_records(model))


def trained_records(model: nn.Module) -> list[Record]:
    """Records of the splines that are being trained, whatever their adapter's name; without occupancy and density.

    Under FSDP every process must call it: the parameters are gathered.
    """
    splines = {n: s for n, s in model.named_modules() if isinstance(s, Spline) and s.weight.requires_grad}
    return _records(model, {_layer_of(name): spline for name, spline in splines.items()})


class Occupancy:
    """Counts of z, per layer: below the grid, in equal bins of it (as many for every interval), and above it."""

    def __init__(self) -> None:
        self.counts: dict[str, Tensor] = {}

    def add(self, layer: str, spline: Spline, z: Tensor) -> None:
        if spline.grid_scale is not None:
            if not spline.is_calibrated:
                return
            z = z / spline.grid_scale
        intervals = spline.num_knots - 1
        bins = intervals * math.ceil(BINS / intervals)
        # A bin for what is below the grid comes first, one for what is above it, or no number, last.
        place = (z.float().flatten() - spline.k_min) * (bins / (spline.k_max - spline.k_min))
        place = place.ceil_().nan_to_num_(nan=bins + 1).clamp_(0, bins + 1).to(torch.int32)
        counts = torch.bincount(place, minlength=bins + 2).cpu()
        self.counts[layer] = self.counts.get(layer, torch.zeros_like(counts)) + counts

    def shares(self, layer: str) -> list[float] | None:
        """Share of the elements in each; None if there were none."""
        counts = self.counts.get(layer)
        return None if counts is None or not counts.sum() else (counts / counts.sum()).tolist()


@contextmanager
def observe_occupancy(model: nn.Module, adapter_name: str = "default") -> Iterator[Occupancy]:
    """Count where on its grid every spline's input z falls during the forward passes inside the `with` block."""
    occupancy = Occupancy()

    def hook(layer: str) -> Any:
        return lambda spline, args: occupancy.add(layer, spline, args[0].detach())

    splines = _named_splines(model, adapter_name)
    handles = [spline.register_forward_pre_hook(hook(layer)) for layer, spline in splines.items()]
    try:
        yield occupancy
    finally:
        for handle in handles:
            handle.remove()


def _per_interval(shares: list[float], intervals: int) -> list[float]:
    """The shares with those of the bins of each interval added up."""
    inner, width = shares[1:-1], (len(shares) - 2) // intervals
    sums = [math.fsum(inner[i : i + width]) for i in range(0, len(inner), width)]
    return [shares[0], *sums, shares[-1]]


def _named_splines(model: nn.Module, adapter_name: str) -> dict[str, Spline]:
    return {
        _layer_of(name, adapter_name): module
        for name, module in model.named_modules()
        if isinstance(module, Spline) and name.endswith(f".lora_spline.{adapter_name}")
    }


def _layer_of(name: str, adapter_name: str = "default") -> str:
    """The adapted layer that the spline of this name belongs to; splines of another adapter keep their whole name."""
    return name.removesuffix(f".lora_spline.{adapter_name}").removeprefix("base_model.model.")


def _records(model: nn.Module, splines: dict[str, Spline]) -> list[Record]:
    """A record for every spline, in their order; under FSDP 1 its units are gathered one after the other."""
    units = [unit for unit in FullyShardedDataParallel.fsdp_modules(model) if _splines_of(unit, splines)]
    if not units:
        return list(_read(splines).values())
    found: dict[str, Record] = {}
    for unit in units:
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
            found |= _read(_splines_of(unit, splines))
    return [found[layer] for layer in splines]


def _splines_of(unit: nn.Module, splines: dict[str, Spline]) -> dict[str, Spline]:
    """Those of the splines that this FSDP 1 unit holds, and no unit within it."""
    inner = [other for other in FullyShardedDataParallel.fsdp_modules(unit) if other is not unit]
    deeper = {id(module) for other in inner for module in other.modules()}
    held = {id(module) for module in unit.modules()} - deeper
    return {layer: spline for layer, spline in splines.items() if id(spline) in held}


def _read(splines: dict[str, Spline]) -> dict[str, Record]:
    """Their records. What is stored comes to the CPU in one piece: training waits for the device once a record."""
    stored = {
        layer: {name: whole(tensor) for name in STORED if (tensor := getattr(spline, name)) is not None}
        for layer, spline in splines.items()
    }
    numbers = iter(_on_cpu([tensor for by_name in stored.values() for tensor in by_name.values()]))
    return {
        layer: _record(layer, splines[layer].grid_on("cpu"), **{name: next(numbers) for name in by_name})
        for layer, by_name in stored.items()
    }


@torch.no_grad()
def _on_cpu(tensors: list[Tensor]) -> list[Tensor]:
    """As fp32 of one dimension; all that a device has is copied at once."""
    found: dict[int, Tensor] = {}
    for device in {tensor.device for tensor in tensors}:
        places = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        flat = [tensors[i].flatten().float() for i in places]
        found |= zip(places, torch.cat(flat).cpu().split([len(tensor) for tensor in flat]), strict=True)
    return [found[i] for i in range(len(tensors))]


def _record(
    layer: str,
    grid: Tensor,
    weight: Tensor,
    input_scale_offset: Tensor | None = None,
    output_scale_offset: Tensor | None = None,
    grid_scale: Tensor | None = None,
) -> Record:
    slopes = (grid + weight).diff() / grid.diff()
    return {
        "layer": layer,
        "grid": grid.tolist(),
        "values": (grid + weight).tolist(),
        "deviation": weight.abs().mean().item(),
        "slope_variance": slopes.var(unbiased=False).item(),
        "grid_scale": 1.0 if grid_scale is None else max(0.0, grid_scale.item()),
        "input_scale": 1.0 if input_scale_offset is None else 1 + input_scale_offset.item(),
        "output_scale": 1.0 if output_scale_offset is None else 1 + output_scale_offset.item(),
        "occupancy": None,
        "density": None,
    }
