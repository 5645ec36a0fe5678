"""A legal adapter of a tiny model, what may be done to its two files, and what must come of loading them."""

from __future__ import annotations

import json
import math
import resource
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel, PeftType, get_peft_model
from safetensors.torch import load
from torch import nn

from lslora import LSLoraConfig
from lslora.spline import splines_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALLOWANCE = 256 * 2**20  # bytes that loading the tiny adapter may take, what was hidden in it included


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


@cache
def legal() -> tuple[bytes, bytes]:
    """The bytes of the config and of the weights of an adapter with every tensor random."""
    config = LSLoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False, calibration_steps=1)
    model = get_peft_model(tiny(), config)
    for number, spline in enumerate(splines_of(model)):
        spline.values = spline.grid + torch.randn(5)
        spline.calibrate(0.5 + number)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder, CONFIG).read_bytes(), Path(folder, WEIGHTS).read_bytes())


def settings() -> dict[str, Any]:
    return json.loads(legal()[0])


def unpack(weights: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file and its body."""
    (length,) = struct.unpack("<Q", weights[:8])
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def pack(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def write(folder: Path, config: bytes, weights: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_bytes(config)
    (folder / WEIGHTS).write_bytes(weights)


@contextmanager
def limited_memory() -> Iterator[None]:
    """Whatever allocates more than `ALLOWANCE` in here fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ALLOWANCE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def is_of_another_method(config: bytes) -> bool:
    """Whether it is peft alone that reads this adapter."""
    try:
        found = json.loads(config)
    except (ValueError, RecursionError):
        return False
    method = found.get("peft_type") if isinstance(found, dict) else None
    return isinstance(method, str) and method in PeftType.__members__ and method != "LSLORA"


def outcome(folder: Path) -> str:
    """`"loaded"`, or `"refused: …"` with the message. Any other error comes through.

    Adapters of other methods are `"peft's"` and not loaded.

    Raises:
        AssertionError: it was loaded, and the model is not what the files say, or they say what nobody may.
    """
    if is_of_another_method((folder / CONFIG).read_bytes()[: 2**22]):
        return "peft's"
    with limited_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = PeftModel.from_pretrained(tiny(), folder)
        except (ValueError, TypeError) as error:
            return f"refused: {error}"
    check_consistent(model, (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes())
    return "loaded"


def check_consistent(model: Any, config: bytes, weights: bytes) -> None:
    """What was loaded is what the files say, by another way of reading them."""
    pairs = json.loads(config, object_pairs_hook=lambda pairs: pairs)
    said = json.loads(config)
    assert len(pairs) == len(said), "a key stands there twice"
    held = model.peft_config["default"].to_dict()
    for name, value in said.items():
        assert name in held, f"{name} is no setting"
        if name not in ("inference_mode", "base_model_name_or_path"):
            found = sorted(held[name]) if isinstance(held[name], set) else held[name]
            assert found == (sorted(value) if isinstance(value, list) else value), f"{name} is {found}, not {value}"
    stored, loaded = load(weights), model.state_dict()
    own = {name: tensor for name, tensor in loaded.items() if ".lora_" in name}
    assert {name.replace(".default", "") for name in own} == set(stored), "other tensors than the file's"
    for name, tensor in own.items():
        assert tensor.isfinite().all(), f"{name} is not finite"
        assert torch.equal(tensor, stored[name.replace(".default", "")].to(tensor.dtype)), f"{name} differs"
    for name, tensor in own.items():
        if ".lora_A" in name or ".lora_B" in name:
            assert tensor.shape["lora_B" in name] == held["r"], f"{name} is not of rank {held['r']}"
        if name.endswith("lora_spline.default.weight"):
            assert tensor.shape == (held["num_knots"],), f"{name} has not one height a knot"
    assert all(math.isfinite(held[name]) for name in ("k_min", "k_max", "lora_alpha", "soft_temperature"))
