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
from torch import Tensor, nn

from . import reference

SOURCE = Path(__file__).with_name("cpu.c")
# The first that the compiler takes. OpenMP is the one torch has loaded, so `torch.set_num_threads` holds here too.
FLAGS = (("-O3", "-march=native", "-fopenmp"), ("-O3",))
BLOCK = 1024  # elements that have sums of their own
LANES = 8  # elements at a time
SIZES = (f"-DBLOCK={BLOCK}", f"-DLANES={LANES}")


class _Spline(ctypes.Structure):
    """`Spline` of cpu.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("offsets", "rises", "input_scale", "output_scale", "stretch")),
        *((name, ctypes.c_float) for name in ("scaling", "k_min", "k_max")),
        *((name, ctypes.c_int) for name in ("knots", "clamps")),
    )


@cache
def library() -> ctypes.CDLL | str:
    """The compiled functions, or in words why there are none on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "cpu.so"
        for flags in FLAGS:
            command = [os.environ.get("CC", "cc"), *flags, *SIZES, "-shared", "-fPIC", str(SOURCE)]
            try:
                subprocess.run([*command, "-o", str(target)], check=True, capture_output=True, text=True)
                return ctypes.CDLL(str(target))
            except subprocess.CalledProcessError as error:
                reason = f"{' '.join(command)} failed: {error.stderr.strip()}"
            except OSError as error:
                reason = f"{command[0]} cannot be run: {error}"
        return reason


def why_not(tensor: Tensor, dtype: torch.dtype) -> str | None:
    """Why this backend cannot take a tensor that is computed in `dtype`, or None if it can."""
    if not tensor.is_cpu:
        return f"the tensor is on {tensor.device}"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"the tensor is a {type(tensor).__name__}"
    if dtype != torch.float32:
        return f"compiled for float32, not {dtype}"
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace into it"
    found = library()
    return found if isinstance(found, str) else None


def forward(z: Tensor, offsets: Tensor, input_scale: Tensor, output_scale: Tensor, grid: reference.Grid) -> Tensor:
    """As `lslora.ops.spline.spline`; computed in float32, returned in the dtype of `z`."""
    numbers = z.float().contiguous()
    out = torch.empty_like(numbers)
    Passes(offsets, input_scale, output_scale, grid).forward(numbers, None, out)
    return out.to(z.dtype)


def backward(
    grad_output: Tensor,
    z: Tensor,
    offsets: Tensor,
    input_scale: Tensor,
    output_scale: Tensor,
    grid: reference.Grid,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `z` (its dtype), `offsets`, `input_scale` and `output_scale` (float32)."""
    g, numbers = grad_output.float().contiguous(), z.float().contiguous()
    grad_z = torch.empty_like(numbers)
    passes = Passes(offsets, input_scale, output_scale, grid)
    passes.backward(g, numbers, grad_z)
    return grad_z.to(z.dtype), *passes.gradients()


class Passes:
    """The functions of cpu.c for `stretch · spline(scaling · x / stretch)`, on contiguous float32 tensors."""

    def __init__(
        self,
        offsets: Tensor,
        input_scale: Tensor,
        output_scale: Tensor,
        grid: reference.Grid,
        scaling: float = 1.0,
        stretch: Tensor | None = None,
    ) -> None:
        # Kept, for only their addresses are handed on.
        self.tensors = offsets.contiguous(), offsets.diff(), input_scale, output_scale, stretch
        self.spline = _Spline(
            *(None if tensor is None else tensor.data_ptr() for tensor in self.tensors),
            scaling,
            grid.k_min,
            grid.k_max,
            len(offsets),
            grid.extrapolation == "clamp",
        )
        self.sums = torch.zeros(len(offsets) + 2, dtype=torch.float64)

    def forward(self, x: Tensor, base: Tensor | None, out: Tensor) -> None:
        """Write `base + stretch · spline(scaling · x / stretch)` to `out`."""
        _call("spline_forward", x, base, out, x.numel(), self.spline)

    def backward(self, g: Tensor, x: Tensor, grad: Tensor) -> None:
        """Write the gradient of `x` to `grad`, which may be `x` itself, and add to the sums."""
        blocks, width = -(-x.numel() // BLOCK), len(self.sums)
        lanes = torch.zeros(blocks, width - 3, LANES)
        rows = torch.empty(blocks, width, dtype=torch.float64)
        _call("spline_backward", g, x, grad, x.numel(), self.spline, lanes, rows, self.sums)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of `offsets`, `input_scale` and `output_scale` (float32), from everything that went backward."""
        found = torch.empty(len(self.sums))
        _call("spline_gradients", self.spline, self.sums, found)
        offsets, input_scale, output_scale = found.split([len(self.sums) - 2, 1, 1])
        return offsets, input_scale, output_scale


def _call(name: str, *arguments: Tensor | int | _Spline | None) -> None:
    """Call a function of the library: tensors as pointers (None: NULL), numbers as `long`, the spline by reference."""
    getattr(library(), name)(*map(_passed, arguments))


def _passed(argument: Tensor | int | _Spline | None) -> Any:
    if argument is None:
        return None
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_long(argument) if isinstance(argument, int) else ctypes.byref(argument)
