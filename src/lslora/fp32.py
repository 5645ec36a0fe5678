"""A module that stays in fp32, whatever casts the model around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class KeepsFp32(nn.Module):
    """A module without children whose parameters and buffers are fp32 and move between devices only.

    A spline's offsets are too small for half precision (FIXES_APPLIED.md, 9), yet everyone casts adapters: peft to the
    base layer's dtype, users with `model.half()`, TRL by assigning to `.data` before training.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._restore_fp32()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore_fp32()
        super()._load_from_state_dict(*args, **kwargs)

    def _restore_fp32(self) -> None:
        for parameter in self.parameters(recurse=False):
            if parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
