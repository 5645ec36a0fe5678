"""The tensors of an adapter, which may come from anyone: what must hold before a layer is made for them.

Only the header is read for their shapes, so a config that asks for more than the file has costs no memory.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from peft import TaskType
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

# The largest models have a hundred thousand adapted layers, experts counted, and a tensor's entry takes 100 bytes.
MAX_HEADER_BYTES = 2**26
FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
TENSOR = re.compile(r"(?P<layer>.+)\.(?P<name>lora_.+)")  # a layer's own name may begin like that
NAME = re.compile(r"[^\x00-\x1f\x7f/\\.]+(\.[^\x00-\x1f\x7f/\\.]+)*")


class Stored(NamedTuple):
    """What the header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


def weights_of(folder: Path) -> Path:
    """The file with an adapter's tensors.

    Raises:
        ValueError: there is none, or a pickle beside it: unpickling runs whatever its author wrote.
    """
    if (pickle := folder / WEIGHTS_NAME).exists():
        raise ValueError(f"{pickle}: an adapter must be saved as {SAFETENSORS_WEIGHTS_NAME} alone, got a pickle")
    if not (weights := folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ValueError(f"{folder} must hold {SAFETENSORS_WEIGHTS_NAME}, got no such file")
    return weights


def check_adapter_files(folder: Path, config: Any = None) -> None:
    """Check that a folder's tensors are whole, finite and, for LS-LoRA, those that the config describes.

    Args:
        folder: Holds `adapter_model.safetensors`.
        config: An `LSLoraConfig`; without one, the adapter is of another method, whose tensors peft knows.

    Raises:
        ValueError: something else holds; the message names the file and the tensor.
    """
    path = weights_of(folder)
    _check_beginning(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {}
            for key in file.keys():  # noqa: SIM118  (the file is no dict)
                entry = file.get_slice(key)
                tensors[key] = Stored(entry.get_dtype(), tuple(entry.get_shape()))
            _check_tensors(path, tensors)
            if config is not None:
                _check_layers(path, tensors, config)
                _check_whole_modules(path, tensors, config)
            for key, tensor in tensors.items():
                if ".lora_" in key and tensor.dtype in FLOATS and not (found := file.get_tensor(key)).isfinite().all():
                    bad = found[~found.isfinite()][0].item()
                    raise ValueError(f"{path}: the checkpoint's {key} must be finite, got {bad}")
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file: {error}") from error


def _check_beginning(path: Path) -> None:
    """A safetensors file begins with the length of its header, in eight bytes, and the header's brace."""
    size = path.stat().st_size
    with path.open("rb") as file:
        beginning = file.read(9)
    length = int.from_bytes(beginning[:8], "little")
    if beginning[8:] != b"{" or length > size - 8:
        raise ValueError(f"{path} must be a whole safetensors file, got {size} bytes that begin with {beginning!r}")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"{path} must have a header of at most {MAX_HEADER_BYTES} bytes, got {length}")


def _check_tensors(path: Path, tensors: dict[str, Stored]) -> None:
    for key, tensor in tensors.items():
        if not NAME.fullmatch(key):
            raise ValueError(f"{path}: a tensor's name must be that of a parameter, got {key!r}")
        if tensor.dtype not in (FLOATS if ".lora_" in key else FLOATS + INTEGERS):
            raise ValueError(f"{path}: {key} must be of one of the types {', '.join(FLOATS)}, got {tensor.dtype}")
        if 0 in tensor.shape:
            raise ValueError(f"{path}: {key} must not be empty, got the shape {tensor.shape}")


def _check_layers(path: Path, tensors: dict[str, Stored], config: Any) -> None:
    """Every layer must have all that the config says, in the shapes that it says, and nothing else."""
    layers: dict[str, dict[str, Stored]] = defaultdict(dict)
    for key, tensor in tensors.items():
        if match := TENSOR.fullmatch(key):
            layers[match["layer"]][match["name"]] = tensor
    if not layers:
        raise ValueError(f"{path} must hold LS-LoRA's tensors, got {len(tensors)} others")
    for layer, found in layers.items():
        shapes = _shapes(layer, found, config)
        for name in found:
            if name not in shapes:
                raise ValueError(f"{path}: the checkpoint has {layer}.{name}, which its config does not know")
        for name, wanted in shapes.items():
            if name not in found:
                raise ValueError(f"{path}: the checkpoint has no {layer}.{name}, which its config asks for")
            shape = found[name].shape
            fits = all(want in (None, got) for want, got in zip(wanted, shape, strict=False))
            if len(shape) < len(wanted) or not fits:
                expected = ", ".join("any" if want is None else str(want) for want in wanted)
                raise ValueError(f"{path}: {layer}.{name} must have the shape ({expected}), got {shape}")


def _check_whole_modules(path: Path, tensors: dict[str, Stored], config: Any) -> None:
    """What is trained besides the layers must be there, one of the modules named at least."""
    modules = [name for name in config.modules_to_save or () if not _may_be_missing(name, config)]
    if modules and not any(f"{name}." in key for name in modules for key in tensors):
        raise ValueError(f"{path}: the checkpoint has no tensor of {', '.join(modules)}, which its config asks for")
    tokens = config.trainable_token_indices
    counts = {len(indices) for indices in (tokens.values() if isinstance(tokens, dict) else [tokens or ()])} - {0}
    deltas = {key: tensor for key, tensor in tensors.items() if key.endswith(".trainable_tokens_delta")}
    if counts and not deltas:
        raise ValueError(f"{path}: the checkpoint has no trainable_tokens_delta, which its config asks for")
    for key, tensor in deltas.items():
        if tensor.shape[:1] not in {(count,) for count in counts}:
            raise ValueError(f"{path}: {key} must have a row for each of trainable_token_indices, got {tensor.shape}")


def _may_be_missing(module: str, config: Any) -> bool:
    """Whether peft saves a module of that name if there is one: how heads are named in most models, not in all."""
    return module in ("classifier", "score") and config.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS)


def _shapes(layer: str, found: dict[str, Stored], config: Any) -> dict[str, tuple[int | None, ...]]:
    """The tensors of a layer and their first dimensions; None where the base layer decides."""
    name = layer.removeprefix("base_model.model.")
    r = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    shapes: dict[str, tuple[int | None, ...]]
    if "lora_embedding_A" in found or "lora_embedding_B" in found:
        shapes = {"lora_embedding_A": (r, None), "lora_embedding_B": (None, r)}
    else:
        b = found.get("lora_B.weight")
        # A convolution in groups has a part of B for each of them; peft knows in how many, the file does not.
        grouped = b is not None and len(b.shape) > 2 and r % b.shape[1] == 0
        shapes = {"lora_A.weight": (r, None), "lora_B.weight": (None, None if grouped else r)}
        if config.lora_bias:
            shapes["lora_B.bias"] = (None,)
    shapes["lora_spline.weight"] = (config.num_knots,)
    if config.learn_scales:
        shapes["lora_spline.input_scale_offset"] = shapes["lora_spline.output_scale_offset"] = (1,)
    if config.calibration_steps:
        shapes["lora_spline.grid_scale"] = (1,)
    return shapes
