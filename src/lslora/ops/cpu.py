"""The piecewise spline on the CPU: one compiled pass over the elements instead of dozens in torch.

The source `cpu.c` is compiled on first use by the machine's C compiler (`CC`, else `cc`), in about half a second.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import reference

SOURCE = Path(__file__).with_name("cpu.c")


class _Shape(ctypes.Structure):
    """`Shape` of cpu.c."""

    _fields_ = (
        *((name, ctypes.c_float) for name in ("k_min", "k_max", "per_spacing", "scale_in", "scale_out")),
        ("last", ctypes.c_int),
        ("clamps", ctypes.c_int),
    )


@cache
def library() -> ctypes.CDLL | str:
    """The compiled functions, or in words why there are none on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "cpu.so"
        command = [os.environ.get("CC", "cc"), "-O3", "-fno-math-errno", "-shared", "-fPIC", str(SOURCE)]
        try:
            subprocess.run([*command, "-o", str(target)], check=True, capture_output=True, text=True)
            return ctypes.CDLL(str(target))
        except subprocess.CalledProcessError as error:
            return f"{' '.join(command)} failed: {error.stderr.strip()}"
        except OSError as error:
            return f"{command[0]} cannot be run: {error}"


def why_not(tensor: Tensor, dtype: torch.dtype) -> str | None:
    """Why this backend cannot take a tensor that is computed in `dtype`, or None if it can."""
    if not tensor.is_cpu:
        return f"the tensor is on {tensor.device}"
    if dtype != torch.float32:
        return f"compiled for float32, not {dtype}"
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace into it"
    found = library()
    return found if isinstance(found, str) else None


def forward(
    z: Tensor,
    offsets: Tensor,
    input_scale: Tensor,
    output_scale: Tensor,
    k_min: float,
    k_max: float,
    extrapolation: str,
) -> Tensor:
    """As `lslora.ops.spline.spline`; computed in float32, returned in the dtype of `z`."""
    numbers = z.float().contiguous()
    out = torch.empty_like(numbers)
    shape = _shape(offsets, input_scale, output_scale, k_min, k_max, extrapolation)
    # Kept until the call is over: only their addresses are handed on.
    offsets, rises = offsets.contiguous(), offsets.diff()
    _call("spline_forward", numbers, out, numbers.numel(), shape, offsets, rises)
    return out.to(z.dtype)


def backward(
    grad_output: Tensor,
    z: Tensor,
    offsets: Tensor,
    input_scale: Tensor,
    output_scale: Tensor,
    k_min: float,
    k_max: float,
    extrapolation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `z` (its dtype), `offsets`, `input_scale` and `output_scale` (float32)."""
    g, numbers = grad_output.float().contiguous(), z.float().contiguous()
    grad_z = torch.empty_like(numbers)
    shape = _shape(offsets, input_scale, output_scale, k_min, k_max, extrapolation)
    rises, count = offsets.diff(), len(offsets) - 1
    sums = torch.zeros(2 * count + 2, dtype=torch.float64)
    _call("spline_backward", g, numbers, grad_z, numbers.numel(), shape, rises, sums)
    s0, s1, value, slope_c = sums.split([count, count, 1, 1])
    return grad_z.to(z.dtype), *reference.from_sums(s0, s1, value, slope_c, offsets, output_scale)


def _shape(
    offsets: Tensor, input_scale: Tensor, output_scale: Tensor, k_min: float, k_max: float, extrapolation: str
) -> _Shape:
    per_spacing = 1 / reference.spacing(len(offsets), k_min, k_max)
    scales = (input_scale.item(), output_scale.item())
    return _Shape(k_min, k_max, per_spacing, *scales, len(offsets) - 2, extrapolation == "clamp")


def _call(name: str, *arguments: Tensor | int | _Shape) -> None:
    """Call a function of the library with tensors as pointers, numbers as `long`, and the shape by reference."""
    passed: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            passed.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, int):
            passed.append(ctypes.c_long(argument))
        else:
            passed.append(ctypes.byref(argument))
    getattr(library(), name)(*passed)
