"""The operation against closed forms, against autograd of the reference, and against finite differences in float64."""

import importlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lslora.ops import cpu, eager, reference
from lslora.ops.spline import HAS_TRITON, spline
from tests.kernels import where_it_runs

BACKENDS = [cpu, eager]
if HAS_TRITON:
    from lslora.ops import triton

    BACKENDS.append(triton)

METHODS = ["piecewise", "soft"]
EXTRAPOLATIONS = ["clamp", "linear"]
NAMES = ("z", "offsets", "input_scale", "output_scale")


def parameters(num_knots=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randn(num_knots, generator=generator, dtype=torch.float64) * 0.3
    scales = 1 + torch.randn(2, generator=generator, dtype=torch.float64) * 0.3
    return [p.to(dtype).requires_grad_() for p in (offsets, scales[:1], scales[1:])]


def away_from_knots(k_min, k_max, num_knots, n=200):
    """Points on both sides of every knot and beyond the ends, none closer to a knot than 1e-3."""
    z = torch.linspace(2 * k_min, 2 * k_max, n, dtype=torch.float64)
    knots = torch.linspace(k_min, k_max, num_knots, dtype=torch.float64)
    return z[(z[:, None] - knots).abs().min(dim=1).values > 1e-3]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_identity_start_is_exact(method, dtype):
    z = torch.linspace(-3, 3, 1001).to(dtype)
    y = spline(z, torch.zeros(5), torch.ones(1), torch.ones(1), k_min=-3, k_max=3, interpolation_method=method)
    assert torch.equal(y, z)
    assert y.dtype == dtype


@pytest.mark.parametrize("num_knots", [2, 3, 5, 17, 64])
def test_piecewise_equals_numpy_interpolation(num_knots):
    offsets, input_scale, output_scale = parameters(num_knots)
    z = torch.linspace(-4, 5, 333, dtype=torch.float64)
    y = spline(z, offsets, input_scale, output_scale, k_min=-2.0, k_max=3.0)
    grid = np.linspace(-2, 3, num_knots)
    t = input_scale.item() * np.clip(z.numpy(), -2, 3)
    expected = output_scale.item() * np.interp(t, grid, grid + offsets.detach().numpy())  # holds the end values
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@given(
    offsets=st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=20),
    k_min=st.floats(-1e3, 1e3),
    width=st.floats(1e-2, 1e3),
    positions=st.lists(st.floats(0, 1), min_size=1, max_size=20),
    method=st.sampled_from(METHODS),
)
def test_values_lie_in_the_hull_of_the_neighbouring_knots(offsets, k_min, width, positions, method):
    """Deviations from the identity, that is: of the two knots beside z, or of all knots for the soft spline."""
    k_max = k_min + width
    z = (k_min + width * torch.tensor(positions, dtype=torch.float64)).clamp(k_min, k_max)
    offsets, one = torch.tensor(offsets, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    y = spline(z, offsets, one, one, k_min=k_min, k_max=k_max, interpolation_method=method)
    left = (((z - k_min) / width * (len(offsets) - 1)).floor().long()).clamp(0, len(offsets) - 2)
    beside = torch.stack([offsets[left], offsets[left + 1]])
    if method == "soft":
        beside = offsets[:, None].expand(-1, len(z))
    # A position beside a knot may round to the interval on its other side: by as much as heights change in 1e-9 of it.
    slack = 1e-9 * (1 + offsets.abs().max())
    assert (y - z >= beside.min(0).values - slack).all() and (y - z <= beside.max(0).values + slack).all()


def test_piecewise_linear_extrapolation_continues_the_end_segments():
    offsets, one = torch.tensor([0.5, 0.0, -1.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    z = torch.tensor([-5.0, -1.0, 0.0, 1.0, 4.0], dtype=torch.float64)
    y = spline(z, offsets, one, one, k_min=-1, k_max=1, extrapolation="linear")
    # Heights −0.5, 0, 0: the left segment has slope 0.5, the right one slope 0.
    torch.testing.assert_close(y, torch.tensor([-2.5, -0.5, 0.0, 0.0, 0.0], dtype=torch.float64))


def test_soft_equals_the_formula_of_the_specification():
    offsets, input_scale, output_scale = parameters()
    z = torch.linspace(-5, 5, 101, dtype=torch.float64)
    for extrapolation in EXTRAPOLATIONS:
        y = spline(
            z, offsets, input_scale, output_scale, k_min=-3, k_max=3,
            interpolation_method="soft", extrapolation=extrapolation, soft_temperature=0.7,
        )  # fmt: skip
        t = input_scale * (z.clamp(-3, 3) if extrapolation == "clamp" else z)
        grid, tau = torch.linspace(-3, 3, 5, dtype=torch.float64), 0.7 * 1.5
        weights = torch.softmax(-((t[:, None] - grid) ** 2) / (2 * tau**2), dim=1)
        torch.testing.assert_close(y, output_scale * (t + (weights * offsets).sum(1)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
@pytest.mark.parametrize("num_knots", [2, 3, 5])
def test_gradcheck(method, extrapolation, num_knots):
    offsets, input_scale, output_scale = parameters(num_knots)
    with torch.no_grad():
        input_scale.fill_(0.9)  # no point of the sample falls onto a knot after scaling, as checked below
    z = (away_from_knots(-3, 3, num_knots, 60)).requires_grad_()
    knots = torch.linspace(-3, 3, num_knots, dtype=torch.float64)
    assert ((0.9 * z.detach().clamp(-3, 3))[:, None] - knots).abs().min() > 1e-4

    def function(z, offsets, input_scale, output_scale):
        return spline(
            z, offsets, input_scale, output_scale, k_min=-3, k_max=3,
            interpolation_method=method, extrapolation=extrapolation,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (z, offsets, input_scale, output_scale))


def exact(z, offsets, input_scale, output_scale, extrapolation):
    """The reference on [−3, 3], for autograd to differentiate."""
    grid = reference.Grid(-3.0, 3.0, extrapolation)
    return reference.spline(
        z, offsets, input_scale, output_scale, grid, interpolation_method="piecewise", soft_temperature=0.5
    )


def fixed_backend(backend, monkeypatch):
    """Let one backend do the work, whatever the tensors are; returns the dtype it is to be tested in."""
    if backend is cpu:
        assert not isinstance(cpu.library(), str), cpu.library()
    monkeypatch.setattr("lslora.ops.spline._backend", lambda tensor, dtype: where_it_runs(backend))
    return torch.float64 if backend is eager else torch.float32


# Of 33 knots in fp32 t may fall on the other side of one: the test after this one has those.
KNOTS = [(backend, knots) for backend in BACKENDS for knots in (2, 3, 5, 9, 33) if backend is eager or knots < 33]


@pytest.mark.parametrize(("backend", "num_knots"), KNOTS)
@pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
@pytest.mark.parametrize("shape", [(0, 7), (1,), (3, 5, 7), (101,)])
def test_written_gradients_equal_autograd_of_the_reference(backend, extrapolation, num_knots, shape, monkeypatch):
    dtype = fixed_backend(backend, monkeypatch)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    z.view(-1)[: min(num_knots, z.numel())] = torch.linspace(-3, 3, num_knots, dtype=torch.float64)[: z.numel()]
    z = z.float().double()
    grad = torch.randn(z.shape, generator=generator, dtype=torch.float64)

    def results(function, dtype):
        leaves = [z.to(dtype).requires_grad_(), *parameters(num_knots, dtype=dtype)]
        y = function(*leaves)
        return {"y": y, **dict(zip(NAMES, torch.autograd.grad(y, leaves, grad.to(dtype)), strict=True))}

    actual = results(partial(spline, k_min=-3.0, k_max=3.0, extrapolation=extrapolation), dtype)
    expected = results(partial(exact, extrapolation=extrapolation), torch.float64)
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].double(), value, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend is not eager])
@pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
def test_compiled_gradients_of_many_knots_and_elements(backend, extrapolation, monkeypatch):
    """Against float64 on a sample far from all knots, where both precisions pick the same intervals."""
    fixed_backend(backend, monkeypatch)
    z = away_from_knots(-3, 3, 33, n=20_000).float()
    grad = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))

    def results(function, dtype):
        leaves = [z.to(dtype).requires_grad_(), *parameters(33, dtype=dtype)]
        with torch.no_grad():
            leaves[2].fill_(1.0)
        y = function(*leaves)
        return {"y": y, **dict(zip(NAMES, torch.autograd.grad(y, leaves, grad.to(dtype)), strict=True))}

    actual = results(partial(spline, k_min=-3.0, k_max=3.0, extrapolation=extrapolation), torch.float32)
    expected = results(partial(exact, extrapolation=extrapolation), torch.float64)
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name].double(), value, rtol=1e-4, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_knot_that_no_element_reaches_gets_an_exactly_zero_gradient(backend, monkeypatch):
    fixed_backend(backend, monkeypatch)
    z = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 0.01 - 0.7  # between the 2nd and the 3rd knot
    offsets, input_scale, output_scale = parameters(dtype=torch.float32)
    with torch.no_grad():
        offsets.zero_()
    spline(z, offsets, input_scale, output_scale, k_min=-3, k_max=3).square().sum().backward()
    assert (offsets.grad[[0, 3, 4]] == 0).all()
    assert (offsets.grad[1:3] != 0).all()


def test_a_forced_backend_runs_or_says_why_it_cannot(monkeypatch):
    z, p, grid = torch.linspace(-4, 4, 101), parameters(dtype=torch.float32), {"k_min": -3, "k_max": 3}
    expected = spline(z, *p, **grid)
    module = importlib.import_module("lslora.ops.spline")
    monkeypatch.setattr(module, "FORCED", "eager")
    torch.testing.assert_close(spline(z, *p, **grid), expected)
    monkeypatch.setattr(module, "FORCED", "cpu")
    with pytest.raises(ValueError, match="LSLORA_BACKEND=cpu cannot run here: compiled for float32"):
        spline(z.double(), *p, **grid)
    monkeypatch.setattr(module, "FORCED", "triton")
    with pytest.raises(ValueError, match="LSLORA_BACKEND=triton cannot run here"):
        spline(z, *p, **grid)
    monkeypatch.setattr(module, "FORCED", "gpu")
    with pytest.raises(ValueError, match="LSLORA_BACKEND must be one of .* got 'gpu'"):
        spline(z, *p, **grid)


def test_more_knots_than_a_stack_holds():
    offsets, one = torch.zeros(400_001, requires_grad=True), torch.ones(1)
    z = torch.tensor([-3.0, 0.25, 2.0])
    y = spline(z, offsets, one, one, k_min=-4, k_max=4)
    torch.testing.assert_close(y, z)
    y.sum().backward()
    assert offsets.grad.nonzero().flatten().tolist() == [50_000, 212_500, 300_000]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_nan_and_disturbs_no_other_element(backend, monkeypatch):
    dtype = fixed_backend(backend, monkeypatch)
    z = torch.tensor([float("nan"), -4.0, 0.5], dtype=dtype, requires_grad=True)
    y = spline(z, *parameters(dtype=dtype), k_min=-3, k_max=3)
    assert y.isnan().tolist() == [True, False, False]
    (gradient,) = torch.autograd.grad(y[1:].sum(), z)
    assert gradient[1:].isfinite().all()


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("architecture", [80, 90])
def test_the_kernels_compile_for_gpus(architecture):
    """Down to machine code, which needs no GPU; in a process of its own, where they are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("compile_kernels.py"), str(architecture)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_without_a_compiler_the_plain_path_gives_the_same_numbers(monkeypatch):
    z, p = torch.linspace(-4, 4, 101), parameters(dtype=torch.float32)
    compiled = spline(z, *p, k_min=-3, k_max=3)
    assert cpu.why_not(z, p[0]) is None
    cpu.library.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    try:
        assert "no-such-compiler cannot be run" in cpu.why_not(z, p[0])
        torch.testing.assert_close(spline(z, *p, k_min=-3, k_max=3), compiled)
    finally:
        cpu.library.cache_clear()


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_input_is_computed_in_fp32(method):
    z = torch.linspace(-2, 2, 257).bfloat16()
    p = parameters(dtype=torch.float32)
    y = spline(z, *p, k_min=-3, k_max=3, interpolation_method=method)
    exact = spline(z.double(), *p, k_min=-3, k_max=3, interpolation_method=method)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.bfloat16())


@pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
def test_nan_and_infinity(extrapolation):
    z = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    y = spline(z, *parameters(dtype=torch.float32), k_min=-3, k_max=3, extrapolation=extrapolation)
    assert y[0].isnan() and y[3].isfinite()
    assert bool(y[1:3].isfinite().all()) == (extrapolation == "clamp")


@given(
    num_knots=st.integers(2, 20),
    k_min=st.floats(-10, 9),
    width=st.floats(0.1, 10),
    seed=st.integers(0, 1000),
    z=st.lists(st.floats(-30, 30), min_size=1, max_size=30),
)
def test_piecewise_stays_within_its_knot_heights(num_knots, k_min, width, seed, z):
    offsets, one = parameters(num_knots, seed=seed)[0].detach(), torch.ones(1, dtype=torch.float64)
    k_max = k_min + width
    values = torch.linspace(k_min, k_max, num_knots, dtype=torch.float64) + offsets
    y = spline(torch.tensor(z, dtype=torch.float64), offsets, one, one, k_min=k_min, k_max=k_max)
    assert y.min() >= values.min() - 1e-9 and y.max() <= values.max() + 1e-9


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_torch_is_no_matter(default):
    """It is that of memory nobody named a type for, which compiled code would overrun or misread."""
    z = torch.linspace(-4, 4, 5000)
    offsets, input_scale, output_scale = parameters(33, torch.float32)

    def found():
        y = spline(z, offsets, input_scale, output_scale, k_min=-3, k_max=3)
        return [y, *torch.autograd.grad(y.square().sum(), (offsets, input_scale, output_scale))]

    expected = found()
    torch.set_default_dtype(default)
    try:
        for _ in range(20):
            for ours, theirs in zip(found(), expected, strict=True):
                assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    finally:
        torch.set_default_dtype(torch.float32)


def test_wrong_arguments_are_refused():
    z, offsets, one = torch.zeros(3), torch.zeros(5), torch.ones(1)
    with pytest.raises(TypeError, match="z must be a floating-point tensor, got torch.int64"):
        spline(z.long(), offsets, one, one, k_min=-3, k_max=3)
    with pytest.raises(ValueError, match=r"offsets must have shape \(K,\) with K >= 2, got \(1,\)"):
        spline(z, offsets[:1], one, one, k_min=-3, k_max=3)
    with pytest.raises(ValueError, match=r"scales must have shape \(1,\)"):
        spline(z, offsets, one, torch.ones(()), k_min=-3, k_max=3)
    with pytest.raises(ValueError, match="k_min must be smaller than k_max"):
        spline(z, offsets, one, one, k_min=3, k_max=3)
    with pytest.raises(ValueError, match="interpolation_method must be one of"):
        spline(z, offsets, one, one, k_min=-3, k_max=3, interpolation_method="cubic")
    with pytest.raises(ValueError, match="extrapolation must be one of"):
        spline(z, offsets, one, one, k_min=-3, k_max=3, extrapolation="constant")
