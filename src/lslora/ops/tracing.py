"""Whether torch would see what a compiled kernel does; where it would not, the formula has to be computed by torch."""

from __future__ import annotations

import torch


def why_hidden() -> str | None:
    """Who is at work that follows torch's own operations and would pass over a compiled kernel, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace into it"
    if needs_formula():
        return "torch.jit.trace, torch.func and forward-mode gradients cannot follow it"
    # make_fx and the like; on a stack of their own for each thread
    return "a dispatch mode would not see it" if torch._C._len_torch_dispatch_stack() else None


def needs_formula() -> bool:
    """Whether even an autograd.Function would be passed over or refused: only plain operations of torch will do."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return forward_mode or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
