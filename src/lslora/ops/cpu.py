"""The piecewise spline on the CPU: one compiled pass over the elements instead of dozens in torch.

The source `cpu.c` is compiled on first use by the machine's C compiler (`CC`, else `cc`), in about half a second.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .tracing import why_hidden

SOURCE = Path(__file__).with_name("cpu.c")
# The first that the compiler takes. OpenMP is the one torch has loaded, so `torch.set_num_threads` holds here too.
FLAGS = (("-O3", "-march=native", "-fopenmp"), ("-O3",))
BLOCK = 1024  # elements that have sums of their own
LANES = 8  # elements at a time
COLUMNS = 64  # of a block that is a part of a matrix
GROUP = 4  # rows that are multiplied at a time
# What the compiled functions write to, whatever torch's defaults are.
SINGLE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
DOUBLE: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
SIZES = (f"-DBLOCK={BLOCK}", f"-DLANES={LANES}", f"-DCOLUMNS={COLUMNS}", f"-DGROUP={GROUP}")


class _Spline(ctypes.Structure):
    """`Spline` of cpu.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("offsets", "scale_in", "scale_out", "stretch")),
        *((name, ctypes.c_float) for name in ("scaling", "origin", "k_min", "k_max")),
        *((name, ctypes.c_int) for name in ("knots", "clamps")),
    )


# Arguments of the functions of cpu.c: memory as addresses, counts as numbers.
FUNCTIONS = {
    "spline_forward": (*2 * [ctypes.c_void_p], ctypes.c_long, ctypes.c_void_p),
    "spline_backward": (*3 * [ctypes.c_void_p], ctypes.c_long, *4 * [ctypes.c_void_p]),
    "spline_gradients": 3 * [ctypes.c_void_p],
    "update_forward": 4 * [ctypes.c_void_p],
    "update_backward": 8 * [ctypes.c_void_p],
}


@cache
def library() -> ctypes.CDLL | str:
    """The compiled functions, or in words why there are none on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "cpu.so"
        for flags in FLAGS:
            command = [*shlex.split(os.environ.get("CC", "cc")), *flags, *SIZES, "-shared", "-fPIC", str(SOURCE)]
            try:
                subprocess.run([*command, "-o", str(target)], check=True, capture_output=True, text=True)
                found = ctypes.CDLL(str(target))
            except subprocess.CalledProcessError as error:
                reason = f"{' '.join(command)} failed: {error.stderr.strip()}"
            except OSError as error:
                reason = f"{command[0]} cannot be run: {error}"
            else:
                for name, arguments in FUNCTIONS.items():
                    getattr(found, name).argtypes = arguments
                return found
        return reason


def why_not(tensor: Tensor, offsets: Tensor) -> str | None:
    """Why this backend cannot compute a spline of a tensor, or None if it can."""
    return _why_not_tensor(tensor, offsets.dtype) or _why_not_here()


def why_not_all(tensors: Iterable[Tensor]) -> str | None:
    """Why this backend cannot take all of these, or None if it can."""
    return next((why for t in tensors if (why := _why_not_tensor(t, t.dtype))), None) or _why_not_here()


def _why_not_tensor(tensor: Tensor, dtype: torch.dtype) -> str | None:
    if not tensor.is_cpu:
        return f"the tensor is on {tensor.device}"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"the tensor is a {type(tensor).__name__}"
    return None if dtype == torch.float32 else f"compiled for float32, not {dtype}"


def _why_not_here() -> str | None:
    if reason := why_hidden():
        return reason
    found = library()
    return found if isinstance(found, str) else None


def forward(z: Tensor, offsets: Tensor, input_scale: Tensor, output_scale: Tensor, grid: reference.Grid) -> Tensor:
    """As `lslora.ops.spline.spline`; computed in float32, returned in the dtype of `z`."""
    numbers = z.float().contiguous()
    out = torch.empty_like(numbers)
    spline = CompiledSpline(offsets, input_scale, output_scale, grid)
    compiled().spline_forward(numbers.data_ptr(), out.data_ptr(), numbers.numel(), spline.shape)
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
    spline = CompiledSpline(offsets, input_scale, output_scale, grid)
    blocks = -(-numbers.numel() // BLOCK)
    memory = spline.workspace(blocks, blocks)
    addresses = (part.data_ptr() for part in memory)
    x, grad = numbers.data_ptr(), grad_z.data_ptr()
    compiled().spline_backward(g.data_ptr(), x, grad, numbers.numel(), spline.shape, *addresses)
    return grad_z.to(z.dtype), *spline.gradients(memory[-1])


class CompiledSpline:
    """`stretch · spline(scaling · x / stretch)` as the functions of cpu.c take it.

    All tensors are float32. The scales are `origin` plus `scale_in` and `scale_out`, which may be None for 0.
    """

    # Small layers pay for every line here as much as for their elements.

    def __init__(
        self,
        offsets: Tensor,
        scale_in: Tensor | None,
        scale_out: Tensor | None,
        grid: reference.Grid,
        scaling: float = 1.0,
        stretch: Tensor | None = None,
        origin: float = 0.0,
    ) -> None:
        # Kept, for only their addresses are handed on.
        self.tensors = offsets.contiguous(), scale_in, scale_out, stretch
        self.knots = offsets.numel()
        self.structure = _Spline(
            *(None if tensor is None else tensor.data_ptr() for tensor in self.tensors),
            scaling,
            origin,
            grid.k_min,
            grid.k_max,
            self.knots,
            grid.extrapolation == "clamp",
        )
        self.shape = ctypes.byref(self.structure)

    def workspace(self, blocks: int, at_once: int) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for the sums of so many blocks, so many at once: `more`, `rows` and `sums` of cpu.c."""
        more = torch.empty(at_once, self.knots - 1, LANES, **SINGLE)
        rows = torch.empty(blocks, self.knots + 2, **DOUBLE)
        return more, rows, torch.zeros(self.knots + 2, **DOUBLE)

    def gradients(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of `offsets`, `input_scale` and `output_scale` (float32), from what a backward function has summed up."""
        found = torch.empty(self.knots + 2, **SINGLE)
        compiled().spline_gradients(self.shape, sums.data_ptr(), found.data_ptr())
        knots, scale_in, scale_out = found.split((self.knots, 1, 1))
        return knots, scale_in, scale_out


def compiled() -> Any:
    """The compiled functions, where `why_not` has found nothing against them."""
    return library()
