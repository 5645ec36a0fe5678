"""What the splines of a model look like: model → records; records → metrics, table (and pictures: `lslora.plots`).

A record is a flat dict of one layer's spline; `pandas.DataFrame(records)` is a table of them:

| key | meaning |
|---|---|
| `layer` | name of the adapted layer |
| `grid`, `values` | knot positions `k_i` and heights `v_i`, K numbers each |
| `deviation` | `mean_i abs(v_i − k_i)`: 0 at the start, 0.01 to 0.1 learning, above 1 overfitting |
| `slope_variance` | `var_i((v_{i+1} − v_i) / Δk)`: 0 at the start, above 0.05 meaningful curvature, above 1 unstable |
| `input_scale`, `output_scale` | numbers, 1 at the start |
| `grid_scale` | factor on the grid and the values (`calibration_steps`; 0 until it is known), else 1 |
| `occupancy` | share of the elements of z below the grid, in each of its K − 1 intervals, and above it; or None |
| `density` | the same of z within the grid in finer bins, `BINS` or more of equal width; or None |
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from .files import write_whole
from .spline import Spline, whole

if TYPE_CHECKING:
    from rich.table import Table

Record = dict[str, Any]

AVERAGED = ("deviation", "slope_variance", "input_scale", "output_scale")
SHOWN = ("layer", "grid", "values", "occupancy", *AVERAGED)  # in tables and pictures
STORED = ("weight", "input_scale_offset", "output_scale_offset", "grid_scale")  # of a spline
BINS = 48
LIVE_SHARE = 0.01


def spline_records(
    model: nn.Module, adapter_name: str = "default", occupancy: Occupancy | None = None
) -> list[Record]:
    """One record for every layer that has a spline of this adapter, in the model's order; see the module's docstring.

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


def mean_metrics(records: list[Record]) -> dict[str, float]:
    """Averages over the records, as `spline/<key>`; empty without any."""
    return {f"spline/{key}": math.fsum(r[key] for r in records) / len(records) for key in AVERAGED if records}


def verdict(record: Record) -> str:
    """The record's deviation and slope variance in words."""
    deviation, slope_variance = record["deviation"], record["slope_variance"]
    if not math.isfinite(deviation + slope_variance):
        return "not finite"
    if slope_variance > 1.0:
        return "unstable"
    if deviation > 1.0:
        return "overfitting"
    if slope_variance > 0.05:
        return "curved"
    if deviation >= 0.01:
        return "learning"
    return "barely moved" if deviation > 0 else "identity"


def live_intervals(record: Record) -> float | None:
    """Share of the grid's intervals that hold at least 1 % of the elements of z, or None if z was not observed."""
    if record["occupancy"] is None:
        return None
    inner = record["occupancy"][1:-1]
    return sum(share >= LIVE_SHARE for share in inner) / len(inner)


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


def save_records(records: list[Record], path: str | Path) -> None:
    """Write `{"layers": records, "mean": averages, "verdicts": counts}` as JSON, whole or not at all."""
    verdicts = [verdict(record) for record in records]
    summary = {
        "mean": {key: math.fsum(r[key] for r in records) / len(records) for key in AVERAGED},
        "verdicts": {word: verdicts.count(word) for word in sorted(set(verdicts))},
        "layers": [{**record, "verdict": word} for record, word in zip(records, verdicts, strict=True)],
    }
    write_whole(path, json.dumps(summary, indent=2) + "\n")


def load_records(path: str | Path) -> list[Record]:
    """The records that `save_records` wrote.

    Raises:
        ValueError: the file is no such file.
        OSError: it cannot be read.
    """
    try:
        records = list(json.loads(Path(path).read_text(encoding="utf-8"))["layers"])
        for record, name in product(records, SHOWN):
            record[name]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a file that save_records wrote: {error!r}") from error
    return records


def spline_table(records: list[Record], max_rows: int = 12) -> Table:
    """A table for the terminal: the layers that deviate most, and the mean over all of them."""
    from rich.table import Table

    table = Table(title=f"Splines of {len(records)} layers, those that deviate most")
    table.add_column("layer", overflow="fold", min_width=10)
    for heading in ("deviation", "slope\nvariance", "input\nscale", "output\nscale", "live\nintervals"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)  # what the table is read for
    shown = sorted(records, key=lambda r: r["deviation"], reverse=True)[:max_rows]
    for record in shown:
        live = live_intervals(record)
        numbers = [f"{record[key]:.4f}" for key in AVERAGED]
        table.add_row(
            record["layer"].removeprefix("model.layers."),
            *numbers,
            "-" if live is None else f"{live:.0%}",
            verdict(record),
        )
    observed = [live for live in map(live_intervals, records) if live is not None]
    table.add_section()
    table.add_row(
        f"mean of {len(records)}",
        *(f"{math.fsum(r[key] for r in records) / len(records):.4f}" for key in AVERAGED),
        f"{math.fsum(observed) / len(observed):.0%}" if observed else "-",
        "",
    )
    return table


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


def _short(layer: str) -> str:
    return layer.removeprefix("model.layers.")
