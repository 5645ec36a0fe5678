"""The update in one operation: against its formula in float64, against calling the modules, and what it saves."""

import importlib
import itertools
import math
from collections import defaultdict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lslora import LSLoraConfig, Spline
from lslora.ops import cpu_update, reference
from lslora.ops.linear import adapted_linear
from lslora.ops.spline import HAS_TRITON
from lslora.ops.update import update
from tests.kernels import INTERPRETED, where_it_runs

BACKENDS = [cpu_update]
if HAS_TRITON:
    from lslora.ops import triton_update

    BACKENDS.append(triton_update)

NAMES = ("result", "h", "weight", "offsets", "input_scale", "output_scale")
SCALING, STRETCH = 2.5, 0.7


@pytest.fixture
def poisoned():
    """Memory that is not written reads as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(rows=(7,), out=5, r=3, num_knots=5, seed=0):
    """In float64 and representable in float32, z beyond both ends of [−3, 3] and no element of it near a knot."""
    generator = torch.Generator().manual_seed(seed)
    weight, offsets = (torch.randn(shape, generator=generator).double() for shape in ((out, r), (num_knots,)))
    input_scale, output_scale = torch.tensor([0.875]).double(), torch.tensor([1.25]).double()
    knots = torch.linspace(-3, 3, num_knots).double()
    h = torch.randn(4 * math.prod(rows) + 20, r, generator=generator).double()
    z = SCALING / STRETCH * h @ weight.T
    away = torch.minimum((z.abs() - 3).abs(), (input_scale * z[..., None] - knots).abs().amin(-1)).amin(-1)
    h = h[away > 1e-5][: math.prod(rows)].view(*rows, r)
    return [torch.randn(*rows, out, generator=generator).double(), h, weight, offsets * 0.3, input_scale, output_scale]


def formula(result, h, weight, offsets, input_scale, output_scale, extrapolation):
    z = SCALING / STRETCH * (h @ weight.T)
    grid = reference.Grid(-3.0, 3.0, extrapolation)
    values = reference.spline(
        z, offsets, input_scale, output_scale, grid, interpolation_method="piecewise", soft_temperature=0.5
    )
    return result + STRETCH * values


def fused(*operands, extrapolation):
    grid = {"k_min": -3.0, "k_max": 3.0, "extrapolation": extrapolation}
    *operands, input_scale, output_scale = operands
    return update(
        *operands, input_scale - 1, output_scale - 1, stretch=torch.tensor([STRETCH]), scaling=SCALING, **grid
    )


def results(function, operands, dtype, extrapolation="clamp"):
    """The output and the gradient of every operand, by name, as float64."""
    leaves = [operand.to(dtype).requires_grad_() for operand in operands]
    y = function(*leaves, extrapolation=extrapolation)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    gradients = torch.autograd.grad(y, leaves, grad.to(dtype))
    return {"y": y.detach().double()} | {n: g.double() for n, g in zip(NAMES, gradients, strict=True)}


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Each in turn does the work, whatever the tensors are."""
    monkeypatch.setattr("lslora.ops.update.backend_for", lambda *tensors: where_it_runs(request.param))
    monkeypatch.setattr(request.param, "PROGRAMS", 3, raising=False)  # few programs, with several tiles each
    return request.param


@pytest.mark.parametrize("extrapolation", ["clamp", "linear"])
@pytest.mark.parametrize(
    ("rows", "out", "r", "num_knots"),
    [
        ((7,), 5, 3, 5),
        ((1,), 1, 1, 2),
        ((2, 3), 17, 16, 9),
        ((1, 2), 65, 16, 9),
        ((3,), 200, 17, 5),
        ((4,), 129, 9, 5),
        ((0,), 4, 2, 3),
        ((3, 0), 4, 2, 3),
        ((301,), 33, 8, 33),
        ((133,), 200, 17, 5),
        ((16,), 64, 256, 12),
    ],
)
def test_output_and_every_gradient_equal_the_formula_in_float64(
    rows, out, r, num_knots, extrapolation, poisoned, backend
):
    given = operands(rows, out, r, num_knots)
    actual = results(fused, given, torch.float32, extrapolation)
    for name, expected in results(formula, given, torch.float64, extrapolation).items():
        torch.testing.assert_close(
            actual[name], expected, rtol=2e-5, atol=2e-5 * max(1.0, len(actual["y"].flatten()) ** 0.5), msg=name
        )


@pytest.mark.parametrize(("m", "r"), [(256, 16), (200, 24)])
def test_a_gradient_on_a_cpu_holds_its_own_memory_alone(m, r):
    """And not that of what every thread summed up: every layer keeps its gradient until the optimizer's step."""
    leaves = [operand.float().requires_grad_() for operand in operands((300,), m, r, 5)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        fused(*leaves, extrapolation="clamp").sum().backward()
    finally:
        torch.set_num_threads(threads)
    gradient = leaves[NAMES.index("weight")].grad
    assert gradient.untyped_storage().nbytes() < 2 * gradient.numel() * gradient.element_size()


@pytest.mark.parametrize("num_knots", [5, 12])
def test_on_a_cpu_threads_share_the_work(num_knots, poisoned):
    """Only B's gradient, which every thread sums up over its own rows, may differ in its last bits."""
    given = operands((300,), 200, 24, num_knots)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(results(fused, given, torch.float32))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name, value in found[0].items():
            if name == "weight":
                torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-4)
            else:
                assert torch.equal(other[name], value), name


def test_its_error_is_at_most_twice_that_of_plain_float32(backend):
    """By name, pooled over draws: the gradient of a scale is a single number, and by luck exact, or near zero."""
    errors = {"plain": defaultdict(float), "ours": defaultdict(float)}
    for seed in range(30):
        given = operands((150,), 70, 16, 9, seed)
        exact = results(formula, given, torch.float64)
        for kind, function in (("plain", formula), ("ours", fused)):
            for name, value in results(function, given, torch.float32).items():
                errors[kind][name] += (value - exact[name]).square().sum().item()
    for name, error in errors["ours"].items():
        assert error**0.5 <= 2 * errors["plain"][name] ** 0.5, f"{name}: {error:.2e}, {errors['plain'][name]:.2e}"


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        pytest.param(torch.bfloat16, marks=pytest.mark.skipif(INTERPRETED, reason="tl.dot gets it wrong")),
    ],
)
def test_the_kernels_error_in_half_precision_is_at_most_twice_that_of_plain_torch(dtype, monkeypatch):
    monkeypatch.setattr("lslora.ops.update.backend_for", lambda *tensors: where_it_runs(triton_update))
    given = operands((150,), 70, 16, 9)
    given = [operand.to(dtype).double() for operand in given[:3]] + given[3:]  # all of them the same numbers

    def found(function, dtype):
        leaves = [operand.to(dtype if i < 3 else torch.float32).requires_grad_() for i, operand in enumerate(given)]
        if dtype == torch.float64:
            leaves = [operand.clone().requires_grad_() for operand in given]
        y = function(*leaves, extrapolation="linear")
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    def plain(result, *operands, extrapolation):
        return formula(result, *operands, extrapolation=extrapolation).to(result.dtype)

    exact, ours, by_torch = found(formula, torch.float64), found(fused, dtype), found(plain, dtype)
    assert ours[0].dtype == dtype
    for name, value, mine, theirs in zip(("y", *NAMES), exact, ours, by_torch, strict=True):
        assert (mine.double() - value).norm() <= 2 * (theirs.double() - value).norm(), name


def test_two_runs_give_the_same_bits(backend):
    given = operands((130,), 70, 4)
    first, second = (results(fused, given, torch.float32) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_a_knot_that_no_element_reaches_gets_an_exactly_zero_gradient(backend):
    given = operands((200,), 70, 4)
    z = SCALING / STRETCH * given[1] @ given[2].T
    given[1] *= 1.4 / z.abs().max()
    gradient = results(fused, given, torch.float32)["offsets"]
    assert (gradient[[0, 4]] == 0).all() and (gradient[1:4] != 0).all()


@pytest.mark.parametrize("stretch", [0.0, -3.0])
def test_a_stretch_that_is_not_positive_is_none(stretch, backend):
    given, found = [operand.float() for operand in operands()], []
    for sigma in (torch.tensor([stretch]), None):
        leaves = [operand.requires_grad_() for operand in given]
        *tensors, scale_in, scale_out = leaves
        y = update(*tensors, scale_in - 1, scale_out - 1, stretch=sigma, scaling=SCALING, k_min=-3.0, k_max=3.0)
        found.append([y, *torch.autograd.grad(y.sum(), leaves)])
    assert all(map(torch.equal, *found))


def test_operands_stay_as_they_are_and_need_not_be_contiguous(backend):
    given = [operand.float() for operand in operands((4, 6), 5)]
    strided = [torch.stack([operand, operand], dim=-1)[..., 0] for operand in given]
    assert not strided[0].is_contiguous() and not strided[1].is_contiguous() and not strided[3].is_contiguous()
    before = [operand.clone() for operand in strided]
    expected, actual = (results(fused, operands, torch.float32) for operands in (given, strided))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)
    assert all(map(torch.equal, strided, before))


def test_nan_stays_nan_in_its_row_and_disturbs_no_other(backend):
    given = operands((3,), 5)
    given[1][1] = float("nan")
    y = results(fused, given, torch.float32)["y"]
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_what_it_cannot_take_is_refused():
    given = [operand.float() for operand in operands((4,), 5)]
    with pytest.raises(ValueError, match=r"shapes \(…, out\), \(…, r\) and \(out, r\), got \(4, 5\), \(3, 3\)"):
        fused(given[0], given[1][:3], *given[2:], extrapolation="clamp")
    with pytest.raises(ValueError, match="one operation: compiled for float32, not torch.bfloat16"):
        fused(given[0].bfloat16(), *given[1:], extrapolation="clamp")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="one operation: autocast is on"):
        fused(*given, extrapolation="clamp")
    with pytest.raises(ValueError, match="extrapolation must be one of"):
        fused(*given, extrapolation="constant")


def adapted(config_class=LSLoraConfig, seed=0, **settings):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8))
    model = get_peft_model(net, config_class(r=4, lora_alpha=8, target_modules=["0", "2"], **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_spline" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def splines(model):
    return [module for module in model.modules() if isinstance(module, Spline)]


def hooked(module):
    """A hook, even one that does nothing, may have its reasons: who calls the module otherwise calls it now."""
    module.register_forward_pre_hook(lambda module, args: None)


def by_modules(model):
    """Make the layers call B and the spline."""
    for spline in splines(model):
        hooked(spline)
    return model


def by_updates(model):
    """Make the layers call the base layer and A, and compute the update in one operation."""
    for layer in (model.base_model.model[0], model.base_model.model[2]):
        hooked(layer.lora_A["default"])
    return model


def trained(model, x, run=lambda model, x: model(x)):
    torch.manual_seed(5)
    y = run(model, x)
    y.square().sum().backward()
    return {"y": y.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def counted(monkeypatch):
    """The updates done in one operation, those of whole layers among them, by the operation's name."""
    calls = []
    module = importlib.import_module("lslora.spline")

    def counting(name, real):
        return lambda *args, **kwargs: calls.append(name) or real(*args, **kwargs)

    for name in ("update", "adapted_linear"):
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    return calls


@pytest.mark.parametrize(
    "settings",
    [{}, {"extrapolation": "linear", "num_knots": 9}, {"lora_dropout": 0.5}, {"learn_scales": False},
     {"calibration_steps": 2}, {"use_rslora": True}],
)  # fmt: skip
def test_layers_compute_what_their_modules_do(settings, counted):
    found = []
    for prepare in (lambda model: model, by_updates, by_modules):
        model = prepare(adapted(**settings))
        for spline in splines(model):
            if spline.grid_scale is not None:
                spline.calibrate(0.8)
        found.append(trained(model, torch.linspace(-1, 1, 30).view(5, 6)))
    assert counted == ["adapted_linear", "adapted_linear", "update", "update"]  # models have two layers
    for name, value in found[2].items():
        torch.testing.assert_close(found[0][name], value, msg=f"{name}, whole layers")
        torch.testing.assert_close(found[1][name], value, msg=f"{name}, updates alone")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("prepare", [lambda model: model, by_updates])
def test_parameters_that_were_cast_behind_the_spline_count_as_what_they_are(prepare, dtype, counted):
    """`KeepsFp32` sees no assignment to `data`, and compiled code reads addresses."""
    found = []
    for kept in (dtype, torch.float32):
        model = prepare(adapted(calibration_steps=2)).eval()
        for spline in splines(model):
            spline.calibrate(0.8)
            for tensor in (*spline.parameters(), spline.grid_scale):
                tensor.data = tensor.data.to(dtype).to(kept)
        found.append(model(torch.linspace(-1, 1, 30).view(5, 6)).detach())
    assert len(counted) == 4  # both models' layers
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda layer: layer.eval(), "adapted_linear"),
        (lambda layer: layer.train(), "adapted_linear"),  # with dropout
        (lambda layer: hooked(layer.eval().lora_dropout["default"]), "adapted_linear"),
        (lambda layer: hooked(layer.eval().base_layer), "update"),
        (lambda layer: hooked(layer.eval().lora_A["default"]), "update"),
        (lambda layer: hooked(layer.eval().lora_B["default"]), None),
        (lambda layer: layer.eval().base_layer.requires_grad_(), "update"),
        (lambda layer: layer.eval().base_layer.double(), None),
        (lambda layer: setattr(layer.eval().base_layer, "forward", layer.base_layer.forward), "update"),
    ],
)
def test_what_a_layer_is_computed_by(change, name, counted):
    model = adapted(lora_dropout=0.5)
    change(model.base_model.model[0])
    with torch.no_grad():
        model.base_model.model[0](torch.randn(3, 6).to(model.base_model.model[0].base_layer.weight.dtype))
    assert counted == ([name] if name else [])


def test_two_active_adapters_follow_one_another(counted):
    model = adapted()
    model.add_adapter("second", LSLoraConfig(r=2, target_modules=["0", "2"]))
    model.base_model.set_adapter(["default", "second"])
    model(torch.randn(3, 6))
    assert counted == 4 * ["update"]


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("extrapolation", ["clamp", "linear"])
@pytest.mark.parametrize(("rows", "bias"), [((130,), True), ((2, 3), False), ((0,), True)])
def test_a_whole_layer_and_every_gradient_equal_the_formula_in_float64(
    rows, bias, extrapolation, drops, poisoned, backend, monkeypatch
):
    monkeypatch.setattr("lslora.ops.linear.backend_for", lambda *tensors: where_it_runs(backend))
    names = ("x", "a", "weight", "offsets", "input_scale", "output_scale", *(("dropped",) if drops else ()))
    generator = torch.Generator().manual_seed(3)
    _, _, weight, *rest = operands((1,), 70, 9)
    weight = weight * 0.01  # z within the first interval beside zero: far from every knot
    x, a, dropped = (torch.randn(shape, generator=generator).double() for shape in ((*rows, 33), (9, 33), (*rows, 33)))
    base_weight, base_bias = (torch.randn(shape, generator=generator).double() for shape in ((70, 33), (70,)))
    rest[0] = rest[0] + 0.2  # φ(0) ≠ 0
    base_bias = base_bias if bias else None

    def whole(x, a, weight, offsets, input_scale, output_scale, dropped=None):
        base = base_weight.float(), base_bias if base_bias is None else base_bias.float()
        stretch, grid = torch.tensor([STRETCH]), {"k_min": -3.5, "k_max": 2.5, "extrapolation": extrapolation}
        scales = input_scale - 1, output_scale - 1
        settings = {"stretch": stretch, "scaling": SCALING, "dropped": dropped, **grid}
        return adapted_linear(x, *base, a, weight, offsets, *scales, **settings)

    def exactly(x, a, weight, offsets, input_scale, output_scale, dropped=None):
        z = SCALING / STRETCH * ((x if dropped is None else dropped) @ a.T @ weight.T)
        grid = reference.Grid(-3.5, 2.5, extrapolation)
        values = reference.spline(
            z, offsets, input_scale, output_scale, grid, interpolation_method="piecewise", soft_temperature=0.5
        )
        return nn.functional.linear(x, base_weight, base_bias) + STRETCH * values

    found = []
    for function, dtype in ((exactly, torch.float64), (whole, torch.float32)):
        tensors = (x, a, weight, *rest, *((dropped,) if drops else ()))
        leaves = [leaf.to(dtype).requires_grad_() for leaf in tensors]
        y = function(*leaves)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, g)])
    for name, expected, actual in zip(("y", *names), *found, strict=True):
        scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-5 * scale, msg=name)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_keeps_its_adapter_in_float32(dtype, drops, monkeypatch):
    """At most twice as far from float64 as plain torch, and without the copy of x in float32 that it saves."""
    monkeypatch.setattr("lslora.ops.linear.backend_for", lambda *tensors: where_it_runs(triton_update))
    shapes = {"x": (40, 33), "a": (9, 33), "b": (70, 9), "w": (70, 33), "g": (40, 70), "dropped": (40, 33)}
    given = {name: torch.randn(shape, generator=torch.Generator().manual_seed(3)) for name, shape in shapes.items()}
    given = {name: tensor if name in "ab" else tensor.to(dtype) for name, tensor in given.items()}
    offsets, saved = torch.linspace(-0.3, 0.4, 9), []

    def whole(x, a, b, dropped):
        settings = {"scaling": 0.1, "k_min": -3.0, "k_max": 3.0, "extrapolation": "linear"}
        return adapted_linear(
            x, given["w"], None, a, b, offsets, None, None, dropped=dropped if drops else None, **settings
        )

    def plain(x, a, b, dropped):
        z = 0.1 * (dropped if drops else x).to(a.dtype) @ a.T @ b.T
        grid, kind = (
            reference.Grid(-3.0, 3.0, "linear"),
            {"interpolation_method": "piecewise", "soft_temperature": 0.5},
        )
        values = reference.spline(z, offsets.to(z.dtype), *torch.ones(2, 1).to(z.dtype), grid, **kind)
        return (nn.functional.linear(x, given["w"].to(x.dtype)) + values).to(x.dtype)

    def found(function, cast=lambda tensor: tensor):
        leaves = [cast(given[name]).clone().requires_grad_() for name in ("x", "a", "b", *(["dropped"] * drops))]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = function(*leaves, *([None] * (not drops)))
        gradients = torch.autograd.grad(y, leaves, cast(given["g"]))
        assert [gradient.dtype for gradient in gradients] == [leaf.dtype for leaf in leaves]
        return dict(zip(("y", "x", "a", "b", "dropped"), (y.detach(), *gradients), strict=False))

    def copies():
        return [tensor for tensor in saved if tensor.shape == (40, 33) and tensor.dtype == torch.float32]

    exact, by_torch = found(plain, torch.Tensor.double), found(plain)
    assert copies()
    saved.clear()
    for name, value in found(whole).items():
        mine, theirs = ((other.double() - exact[name]).norm() for other in (value, by_torch[name]))
        assert mine <= 2 * theirs, f"{name}: {mine:.2e}, {theirs:.2e}"
    assert not copies()


def test_a_whole_layer_that_it_cannot_take_is_refused():
    x, base, a, b = torch.randn(4, 3), torch.randn(5, 3), torch.randn(2, 3), torch.randn(5, 2)
    settings = {"scaling": 1.0, "k_min": -1.0, "k_max": 1.0}
    with pytest.raises(ValueError, match=r"shapes \(…, in\), \(out, in\), \(r, in\) and \(out, r\), got \(4, 3\)"):
        adapted_linear(x, base, None, a, b[:4], torch.zeros(5), None, None, **settings)
    with pytest.raises(ValueError, match="in one operation: the base layer is trained"):
        adapted_linear(x, base.requires_grad_(), None, a, b, torch.zeros(5), None, None, **settings)
    with pytest.raises(ValueError, match="in one operation: compiled for float32, not torch.float64"):
        adapted_linear(x.double(), base.detach().double(), None, a, b, torch.zeros(5), None, None, **settings)
    with pytest.raises(ValueError, match=r"dropped must be as x, \(4, 3\) torch.float32, got \(3, 3\)"):
        adapted_linear(x, base.detach(), None, a, b, torch.zeros(5), None, None, dropped=x[:3], **settings)


def test_a_spline_that_waits_for_its_grid_is_observed(counted):
    model = adapted(calibration_steps=1)
    with torch.no_grad():
        for spline in splines(model):
            spline.weight.zero_()
    model(torch.randn(3, 6))
    assert not counted


@pytest.mark.parametrize("settings", [{"lora_bias": True}, {"interpolation_method": "soft"}])
def test_layers_that_do_more_call_their_modules(settings, counted):
    trained(adapted(**settings), torch.randn(3, 6))
    assert not counted


def test_a_forced_backend_other_than_cpu_is_kept_to(counted, monkeypatch):
    monkeypatch.setattr(importlib.import_module("lslora.ops.spline"), "FORCED", "eager")
    trained(adapted(), torch.randn(3, 6))
    assert not counted


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant, counted):
    x = torch.randn(5, 6, requires_grad=True)
    expected = trained(adapted(), x)
    actual = trained(adapted(), x, lambda model, x: checkpoint(model, x, use_reentrant=use_reentrant))
    assert len(counted) == 6  # two layers, the second time twice
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_a_layer_used_twice_in_one_forward_pass(counted):
    torch.manual_seed(0)
    base = nn.Linear(6, 6)
    x = torch.randn(4, 6)
    found = []
    for prepare in (lambda model: model, by_modules):
        model = prepare(get_peft_model(nn.Sequential(base, base), LSLoraConfig(r=2, target_modules=["0"])))
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter))
        found.append(trained(model, x))
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, msg=name)


def saved_bytes(model, x):
    """What autograd keeps of a forward pass, parameters and the input aside, each piece of memory counted once."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), x)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    del y
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dropout", [{}, {"lora_dropout": 0.5}])
@pytest.mark.parametrize("settings", [{}, {"calibration_steps": 3}, {"learn_scales": False, "num_knots": 9}])
def test_a_layer_saves_no_more_than_plain_lora(settings, dropout):
    x = torch.randn(64, 6, requires_grad=True)
    ours = adapted(**settings, **dropout)
    for spline in splines(ours):
        if spline.grid_scale is not None:
            spline.calibrate(1.0)
    plain, few = saved_bytes(adapted(LoraConfig, **dropout), x), 2 * 4 * (9 + 2)  # two layers' knots and scales
    assert plain >= 2 * 64 * 4 * 4  # h of both layers
    assert saved_bytes(ours, x) <= plain + few
    assert saved_bytes(by_modules(adapted(**dropout)), x) > plain + 64 * 8 * 4  # the check can fail


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize(
    ("dtype", "r", "num_knots", "why"),
    [
        (torch.float64, 4, 5, "written for float32, float16 and bfloat16, not torch.float64"),
        (torch.bfloat16, 256, 64, None),
        (torch.bfloat16, 257, 5, "r must be at most 256 with an h of torch.bfloat16, got 257"),
        (torch.float32, 32, 5, None),
        (torch.float32, 33, 5, "r must be at most 32 with an h of torch.float32, got 33"),
        (torch.float16, 4, 65, "written for at most 64 knots, not 65"),
    ],
)
def test_what_the_triton_kernels_take(dtype, r, num_knots, why):
    with FakeTensorMode():
        h, weight = torch.empty(2, r, dtype=dtype, device="cuda"), torch.empty(3, r, device="cuda")
    assert triton_update.why_not((h, weight), h.dtype, r, num_knots) == why
    assert "on cpu" in triton_update.why_not((torch.empty(2),), torch.float32, r, num_knots)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("settings", [{}, {"extrapolation": "linear", "num_knots": 9, "learn_scales": False}])
@pytest.mark.parametrize(
    ("dtype", "autocasts", "names"),
    [
        (torch.float32, False, ["adapted_linear", "update", None]),
        (torch.float32, True, ["adapted_linear", "update", None]),
        (torch.bfloat16, True, ["adapted_linear", "update", None]),
        (torch.bfloat16, False, ["adapted_linear", "update", None]),  # A and B are in fp32
    ],
)
def test_layers_on_a_gpu(settings, dtype, autocasts, names, counted):
    """Pooled over draws, at most twice as far from their modules in float64 as these are in the same precision."""

    def on_gpu(prepare, seed):
        model = prepare(adapted(seed=seed, **settings).to("cuda"))
        for name in ("0", "2"):
            model.get_submodule(f"base_model.model.{name}.base_layer").to(dtype)
        return model

    errors = {kind: defaultdict(float) for kind in ("whole", "update", "modules")}
    ways = zip(errors, (lambda model: model, by_updates, by_modules), names, strict=True)
    for (kind, prepare, name), seed in itertools.product(list(ways), range(10)):
        x = torch.randn(50, 6, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)
        expected = trained(on_gpu(by_modules, seed).double(), x.double())
        counted.clear()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocasts):
            found = trained(on_gpu(prepare, seed), x)
        assert counted == ([name] * 2 if name else [])
        for key, value in found.items():
            errors[kind][key] += (value - expected[key]).square().sum().item()
    for kind, key in itertools.product(("whole", "update"), errors["modules"]):
        error, least = errors[kind][key] ** 0.5, errors["modules"][key] ** 0.5
        assert error <= 2 * least + 1e-6, f"{kind}, {key}: {error:.2e}, {least:.2e}"
