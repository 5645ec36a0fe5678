"""Launches that skip Triton's search for what a kernel is compiled to: the same numbers as with it."""

import pytest
import torch

from lslora.ops import launch as module
from lslora.ops import reference
from lslora.ops.launch import launch
from tests.kernels import INTERPRETED


class Kernel:
    """Stands for a kernel of Triton's: says what it was called with, and whether as something compiled."""

    arg_names = ("x_at", "y_at", "count", "m", "width")

    def __init__(self):
        self.calls = []

    def __getitem__(self, programs):
        def call(*arguments, **settings):
            self.calls.append(("searched", programs, arguments, settings))
            return Compiled(self.calls, len(self.calls))

        return call


class Compiled:
    def __init__(self, calls, number):
        self.calls, self.number = calls, number

    def __getitem__(self, programs):
        return lambda *arguments: self.calls.append((self.number, programs, arguments))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(module, "_compiled", {})
    return Kernel()


def test_the_second_time_takes_what_the_first_compiled(kernel):
    x, y = torch.zeros(2, 8), torch.zeros(3, 8)
    launch(kernel, (1, 2, 3), (x, None), (5,), (16,), {"width": 32, "num_warps": 4})
    launch(kernel, (4, 5, 6), (y, None), (7,), (16,), {"width": 32, "num_warps": 4})
    assert kernel.calls == [
        ("searched", (1, 2, 3), (x, None, 5, 16), {"width": 32, "num_warps": 4}),
        (1, (4, 5, 6), (y.data_ptr(), None, 7, 16, 32)),
    ]


@pytest.mark.parametrize(
    "different",
    [
        {"tensors": (torch.zeros(2, 8, dtype=torch.float16), None)},
        {"tensors": (torch.zeros(2, 8), torch.zeros(2))},
        {"tensors": (torch.zeros(9)[1:], None)},  # at no multiple of 16 bytes
        {"counts": (2**31,)},
        {"numbers": (17,)},
        {"settings": {"width": 64}},
    ],
    ids=["dtype", "there", "alignment", "long", "number", "setting"],
)
def test_what_a_kernel_may_be_compiled_for_is_searched_for(kernel, different):
    given = {"tensors": (torch.zeros(2, 8), None), "counts": (5,), "numbers": (16,), "settings": {"width": 32}}
    launch(kernel, (1, 1, 1), **given)
    launch(kernel, (1, 1, 1), **given | different)
    launch(kernel, (1, 1, 1), **given)
    assert [call[0] for call in kernel.calls] == ["searched", "searched", 1]


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_on_a_gpu_the_numbers_are_those_of_triton_s_own_launches(monkeypatch):
    from lslora.ops import triton_update

    kept = {}
    generator = torch.Generator().manual_seed(0)
    for count, shift in [(64, 0), (64, 0), (50, 0), (1, 0), (64, 1), (33, 1), (200, 0)]:

        def random(*shape, shift=shift):
            numbers = torch.randn(torch.Size(shape).numel() + shift, generator=generator)
            return numbers.cuda()[shift:].view(shape)

        result, g, h, b = random(count, 48), random(count, 48), random(count, 16), random(48, 16)
        spline = 0.3 * random(5), random(1), random(1), torch.ones(1, device="cuda")
        arguments = h, b, *spline, 0.5, reference.Grid(-3.0, 3.0, "linear")
        monkeypatch.setattr(module, "_compiled", {})
        expected = [triton_update.forward(result, *arguments), *triton_update.backward(g, *arguments)]
        monkeypatch.setattr(module, "_compiled", kept)
        found = [triton_update.forward(result, *arguments), *triton_update.backward(g, *arguments)]
        assert all(map(torch.equal, found, expected)), f"{count} rows, shifted by {shift}"
    assert len(kept) == 6  # forward with 32 and 16 rows at once, backward with 128, 64 and 16, and the sums
