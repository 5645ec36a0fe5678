"""What follows torch's operations (torch.jit.trace, make_fx, torch.func, dispatch modes) sees the spline in them."""

import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from lslora import LSLoraConfig, Spline

PLACEMENTS = ["output", "bottleneck", "weight"]
X = torch.linspace(-2, 2, 4 * 8).view(4, 8)


def made(placement):
    """A layer and a nonlinearity, with a bent spline; `placement=None` for plain LoRA."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh())
    settings = {"r": 2, "lora_alpha": 8, "target_modules": ["0"], "init_lora_weights": False}
    if placement is None:
        return get_peft_model(net, LoraConfig(**settings)).eval()
    model = get_peft_model(net, LSLoraConfig(placement=placement, **settings)).eval()
    for spline in model.modules():
        if isinstance(spline, Spline):
            spline.values = [-2.0, -1.0, 0.3, 2.5, 3.5]
    return model


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the number of knots is a constant of the trace
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_traced_models_keep_their_splines_also_when_saved(placement, grad):
    model, file = made(placement), io.BytesIO()
    with torch.set_grad_enabled(grad):
        torch.jit.save(torch.jit.trace(model, (X,)), file)
    file.seek(0)
    other = X.flip(0) * 0.7
    torch.testing.assert_close(torch.jit.load(file)(other), model(other))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_graphs_of_make_fx_keep_their_splines(placement):
    model = made(placement)
    with torch.no_grad():
        graph = make_fx(model)(X)
        torch.testing.assert_close(graph(X.flip(0)), model(X.flip(0)))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_torch_func_differentiates_and_maps(placement):
    model = made(placement)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (row,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, X)
    for i, row in enumerate(X):
        model.zero_grad()
        model(row).square().sum().backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(found[name][i], p.grad, msg=name, rtol=1e-4, atol=1e-5)
    _, slope = torch.func.jvp(model, (X,), (torch.ones_like(X),))
    step = 1e-3
    numeric = (model(X + step) - model(X - step)) / (2 * step)
    torch.testing.assert_close(slope, numeric.detach(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_forward_mode_gradients_are_those_of_torch_func(placement):
    model, direction = made(placement), torch.ones_like(X)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(X, direction))).tangent
    _, expected = torch.func.jvp(model, (X,), (direction,))
    torch.testing.assert_close(tangent, expected)


def test_dispatch_modes_see_as_many_products_as_in_plain_lora():
    counts = []
    for placement in (None, "output"):
        with FlopCounterMode(display=False) as counter:
            made(placement)(X).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@pytest.mark.parametrize("placement", ["output", "bottleneck", "weight"])
def test_second_derivatives_are_refused_where_they_would_lack_a_part(placement):
    torch.manual_seed(0)
    config = LSLoraConfig(r=2, target_modules=["0"], init_lora_weights=False, placement=placement)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), config)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model(torch.randn(3, 8)).square().sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(loss, learned, create_graph=True)
