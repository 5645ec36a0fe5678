"""The three places of the spline: closed forms, gradients in float64, and merging where it is exact."""

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from lslora import LSLoraConfig, Spline
from lslora.ops.reference import Grid, spline

PLACEMENTS = ["output", "bottleneck", "weight"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.gpt2 = Conv1D(4, 5)

    def forward(self, x):
        return self.gpt2(torch.tanh(self.first(x)))


def adapted(config_class=LSLoraConfig, net=None, targets=("first", "gpt2"), seed=0, **settings):
    """A and B of order one; splines far from the identity, the same whatever the placement."""
    torch.manual_seed(seed)
    net = Net() if net is None else net
    model = get_peft_model(net, config_class(r=3, lora_alpha=6, target_modules=list(targets), **settings))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_spline" in name or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def phi(module):
    """The spline of a layer as a function, from the mathematics."""
    s = module.lora_spline["default"]
    return lambda z: spline(
        z,
        s.weight,
        s.input_scale,
        s.output_scale,
        Grid(s.k_min, s.k_max, s.extrapolation),
        interpolation_method=s.interpolation_method,
        soft_temperature=s.soft_temperature,
    )


def closed_form(placement, f, a, b, x):
    if placement == "output":
        return f(2.0 * (x @ a.T @ b.T))
    if placement == "bottleneck":
        return 2.0 * (f(x @ a.T) @ b.T)
    return x @ f(2.0 * (b @ a)).T


@pytest.mark.parametrize("method", ["piecewise", "soft"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_each_placement_in_closed_form(placement, method):
    model = adapted(placement=placement, interpolation_method=method)
    for name, layer in _layers(model):
        x = torch.randn(7, layer.in_features)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        update = closed_form(placement, phi(layer), a, b, x)
        torch.testing.assert_close(layer(x), layer.base_layer(x) + update, msg=name)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_at_the_start_the_model_is_its_base_and_learns_as_plain_lora(placement):
    x = torch.randn(9, 6)
    gradients, outputs = [], []
    for config_class, settings in (
        (LoraConfig, {}),
        (LSLoraConfig, {"placement": placement, "k_min": -9, "k_max": 9}),
    ):
        torch.manual_seed(0)
        model = get_peft_model(Net(), config_class(r=3, lora_alpha=6, target_modules=["first", "gpt2"], **settings))
        torch.testing.assert_close(model(x), model.base_model.model(x))
        with model.disable_adapter():
            base = model(x)
        torch.testing.assert_close(model(x), base)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n})
    torch.testing.assert_close(outputs[1], outputs[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_scale_of_zero_is_no_update_and_another_goes_into_the_spline(placement, fast, monkeypatch):
    if not fast:
        monkeypatch.setattr("lslora.layer.whole_layer", lambda *_: None)
    model, x = adapted(placement=placement), torch.randn(7, 6)
    for _, layer in _layers(model):
        assert phi(layer)(torch.zeros(1)).abs() > 0.01
    with model.disable_adapter():
        base = model(x)
    with rescale_adapter_scale(model, 0.0):
        assert torch.equal(model(x), base)
        if placement == "weight":
            assert not any(layer.get_delta_weight("default").any() for _, layer in _layers(model))
    for _, layer in _layers(model):
        x, a, b = torch.randn(7, layer.in_features), layer.lora_A["default"].weight, layer.lora_B["default"].weight
        update = closed_form(placement, phi(layer), a, b / 4, x)
        if placement == "bottleneck":
            assert torch.equal(update, closed_form(placement, phi(layer), a, b, x) / 4)
        with rescale_adapter_scale(layer, 0.25):
            torch.testing.assert_close(layer(x), layer.base_layer(x) + update)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradients_against_finite_differences(placement):
    model = adapted(placement=placement, targets=["first"]).double()
    layer = model.base_model.model.first
    for name, parameter in layer.lora_spline["default"].named_parameters():
        parameter.data = parameter.data.double()  # past the guard that keeps splines in fp32
        assert parameter.dtype == torch.float64, name
    parameters = [p for p in layer.parameters() if p.requires_grad]
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert len(parameters) == 5
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_the_weight_placement_merges_exactly(safe_merge):
    model = adapted(placement="weight")
    x = torch.randn(9, 6)
    expected = model(x)
    base = {name: layer.base_layer.weight.clone() for name, layer in _layers(model)}
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    for name, layer in _layers(model):
        torch.testing.assert_close(layer.base_layer.weight, base[name])
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not [m for m in merged.modules() if isinstance(m, Spline)]
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("placement", ["output", "bottleneck"])
def test_the_other_placements_refuse_to_merge_and_change_nothing(placement):
    model = adapted(placement=placement)
    base = {name: layer.base_layer.weight.clone() for name, layer in _layers(model)}
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="unless placement='weight'"):
            merge()
    for name, layer in _layers(model):
        assert torch.equal(layer.base_layer.weight, base[name])


def test_nothing_is_merged_where_one_layer_cannot_be():
    """Two adapters on different layers, of which only the first layer's is linear in x."""
    model = adapted(placement="weight", targets=("first",))
    model.add_adapter("other", LSLoraConfig(r=2, target_modules=["gpt2"], init_lora_weights=False))
    x = torch.randn(4, 6)
    before = model.base_model.model.first.base_layer.weight.clone()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge(adapter_names=["default", "other"])
        assert torch.equal(model.base_model.model.first.base_layer.weight, before)
    assert model(x).isfinite().all()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_parameters_may_exist_only_where_they_are_used(placement):
    """accelerate keeps them elsewhere and brings them for the forward pass of their own module."""
    net = nn.Sequential()
    net.add_module("first", nn.Linear(6, 5))
    model = adapted(net=net, targets=("first",), placement=placement).eval()
    x = torch.randn(4, 6)
    expected = model(x)
    offloaded = cpu_offload(model, execution_device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(offloaded(x), expected)


@pytest.mark.parametrize("wrong", [nn.Conv1d(3, 3, 1), nn.MultiheadAttention(4, 2)])
def test_what_cannot_be_adapted_is_refused_before_a_layer_is_touched(wrong):
    net = nn.ModuleDict({"first": nn.Linear(3, 3), "wrong": wrong})
    with pytest.raises(ValueError, match="does not support .*wrong"):
        get_peft_model(net, LSLoraConfig(placement="weight", target_modules=["first", "wrong"]))
    assert type(net["first"]) is nn.Linear


def test_a_second_adapter_is_refused_on_convolutions_too():
    model = get_peft_model(nn.Sequential(nn.Conv1d(3, 3, 1)), LSLoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="does not support convolutions"):
        model.add_adapter("other", LSLoraConfig(r=2, target_modules=["0"], placement="weight"))


def test_a_mergeable_adapter_merges_beside_one_that_is_not():
    model = adapted(placement="weight")
    model.add_adapter("other", LSLoraConfig(r=2, target_modules=["first", "gpt2"]))
    x = torch.randn(9, 6)
    expected = model(x)
    with pytest.raises(ValueError, match="unless placement='weight'"):
        model.merge_adapter(["default", "other"])
    torch.testing.assert_close(model.merge_and_unload(adapter_names=["default"])(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placement_survives_saving(placement, tmp_path):
    model = adapted(placement=placement)
    x = torch.randn(9, 6)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(), tmp_path)
    assert again.peft_config["default"].placement == placement
    assert torch.equal(again(x), model(x))


def test_a_curved_weight_placement_has_a_higher_rank_than_its_factors():
    model = adapted(placement="weight", net=nn.Sequential(nn.Linear(32, 32)), targets=["0"])
    layer = model.base_model.model[0]
    assert torch.linalg.matrix_rank(layer.get_delta_weight("default")) > 3
    torch.testing.assert_close(
        layer(torch.eye(32)) - layer.base_layer.bias,
        layer.base_layer.weight.T + linear(torch.eye(32), layer.get_delta_weight("default")),
        rtol=1e-5,
        atol=1e-5,
    )


def test_the_weight_placement_converts_to_lora():
    model = adapted(placement="weight", targets=["first"])
    config, tensors = convert_to_lora(model, rank=5)
    torch.manual_seed(0)
    plain = get_peft_model(Net(), config)
    plain.load_state_dict({k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}, strict=False)
    x = torch.randn(9, 6)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-4)


def _layers(model):
    return [(name, getattr(model.base_model.model, name)) for name in ("first", "gpt2")]


def test_merging_into_an_integer_weight_raises():
    model = adapted(placement="weight", targets=["first"])
    layer = model.base_model.model.first
    layer.base_layer.weight.requires_grad_(False)
    layer.base_layer.weight.data = torch.ones(5, 6, dtype=torch.int8)
    for safe_merge in (False, True):
        with pytest.raises(ValueError, match="floating-point base weight, got torch.int8"):
            layer.merge(safe_merge=safe_merge)
    assert torch.equal(layer.base_layer.weight, torch.ones(5, 6, dtype=torch.int8))
