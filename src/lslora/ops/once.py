"""Backward passes that are written out, and so cannot be differentiated themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a `backward` raise RuntimeError where its own graph is asked for (`create_graph=True`).

    torch's `once_differentiable` raises where that graph is gone through, which `autograd.grad` does not do for inputs
    that it leads to otherwise: second derivatives would lack a part without a word.
    """

    @wraps(backward)
    def checked(*arguments: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient of an LS-LoRA layer cannot be differentiated again, as create_graph=True is for: take "
                "torch.func, or lslora.ops.reference, for second derivatives"
            )
        return backward(*arguments)

    return checked
