"""Where the Triton kernels run in tests: on a GPU if there is one, else in Triton's interpreter (conftest.py)."""

from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_map_only

INTERPRETED = not torch.cuda.is_available()


def where_it_runs(backend):
    """The backend; on a machine with a GPU, one of Triton kernels with its tensors taken there and back."""
    if INTERPRETED or "triton" not in backend.__name__:
        return backend

    def there_and_back(function):
        def call(*arguments, **named):
            there = tree_map_only(torch.Tensor, torch.Tensor.cuda, (arguments, named))
            found = function(*there[0], **there[1])
            return tree_map_only(torch.Tensor, torch.Tensor.cpu, found)

        return call

    return SimpleNamespace(forward=there_and_back(backend.forward), backward=there_and_back(backend.backward))
