"""Launches of Triton kernels without the search for what they are compiled to, which takes longer than the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ALIGNED = 16  # bytes; what Triton compiles for, wherever it finds it

_compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}


def launch(
    kernel: Any,
    programs: tuple[int, int, int],
    tensors: tuple[Tensor | None, ...],
    counts: tuple[int, ...],
    numbers: tuple[float, ...],
    settings: dict[str, Any],
) -> None:
    """Run a kernel on the device of the first tensor, in its current stream.

    The kernel's parameters are these, in this order. What it is compiled to is kept by all but the counts, so there is
    as much of it as there are shapes of layers.

    Args:
        kernel: Compiled without regard to the counts (`do_not_specialize`).
        programs: The grid.
        tensors: Contiguous; None where the kernel shall do without.
        counts: Integers that change from call to call, like that of tokens.
        numbers: What the kernel may be compiled for: integers are, if they are 1 or divisible by 16. Each always has
            one type: 2 and 2.0 are not told apart.
        settings: Parameters that are constants when it is compiled, and options of the compiler.
    """
    first = tensors[0]
    if first.is_cuda and first.get_device() != torch.cuda.current_device():  # type: ignore[union-attr]
        with torch.cuda.device_of(first):
            return launch(kernel, programs, tensors, counts, numbers, settings)
    addresses = [tensor if tensor is None else tensor.data_ptr() for tensor in tensors]
    kinds = [tensor if tensor is None else tensor.dtype for tensor in tensors]
    long = [count >> 31 > 0 for count in counts]  # is all that the kernel knows of them
    key = kernel, first.get_device(), numbers, *long, *kinds, *settings.values()  # type: ignore[union-attr]
    aligned = not any(address % ALIGNED for address in addresses if address)
    if aligned and key in _compiled:
        found, constants = _compiled[key]
        found[programs](*addresses, *counts, *numbers, *constants)
        return None
    found = kernel[programs](*tensors, *counts, *numbers, **settings)
    if aligned and found is not None:  # the interpreter compiles nothing
        given = len(tensors) + len(counts) + len(numbers)
        _compiled[key] = found, [settings[name] for name in kernel.arg_names[given:]]
    return None
