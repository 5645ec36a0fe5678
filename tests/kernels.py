"""Where the Triton kernels run in tests: on a GPU if there is one, else in Triton's interpreter (conftest.py)."""

from types import SimpleNamespace

import torch

INTERPRETED = not torch.cuda.is_available()


def where_it_runs(backend):
    """The backend; on a machine with a GPU, one of Triton kernels with its tensors taken there and back."""
    if INTERPRETED or "triton" not in backend.__name__:
        return backend

    def there_and_back(function):
        def call(*arguments):
            found = function(*(a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments))
            return found.cpu() if isinstance(found, torch.Tensor) else tuple(t if t is None else t.cpu() for t in found)

        return call

    return SimpleNamespace(forward=there_and_back(backend.forward), backward=there_and_back(backend.backward))
