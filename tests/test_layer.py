"""The layer and the model against peft's plain LoRA, the closed form, and a fresh process."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from lslora import LSLoraConfig, LSLoraLayer, Spline
from lslora.layer import lslora_class


class Net(nn.Module):
    """Two linear layers, with and without bias, and one of every other kind of base layer that is supported."""

    def __init__(self):
        super().__init__()
        self.with_bias = nn.Linear(8, 12)
        self.without_bias = nn.Linear(12, 10, bias=False)
        self.gpt2 = Conv1D(6, 10)
        self.conv = nn.Conv1d(1, 3, kernel_size=2)

    def forward(self, x):
        return self.conv(self.gpt2(self.without_bias(torch.tanh(self.with_bias(x)))).unsqueeze(1))


LAYERS = ["with_bias", "without_bias", "gpt2", "conv"]


def adapted(config_class, seed=0, net=None, targets=LAYERS, **settings):
    """The same net with the same A and B whatever the config class; B is not zero."""
    torch.manual_seed(seed)
    net = Net() if net is None else net
    model = get_peft_model(net, config_class(r=4, lora_alpha=8, target_modules=list(targets), **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def splines(model):
    return [module for module in model.modules() if isinstance(module, Spline)]


@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    ends=st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=2, unique=True).map(sorted),
    num_knots=st.integers(2, 40),
    options=st.fixed_dictionaries(
        {
            "interpolation_method": st.sampled_from(["piecewise", "soft"]),
            "extrapolation": st.sampled_from(["clamp", "linear"]),
            "soft_temperature": st.floats(1e-6, 1e6),
            "learn_scales": st.booleans(),
        }
    ),
)
@settings(deadline=None)
def test_a_spline_starts_as_the_identity_whatever_the_shape_and_the_range(shape, ends, num_knots, options):
    k_min, k_max = (-abs(ends[0]), abs(ends[1])) if options["extrapolation"] == "clamp" else ends
    try:
        config = LSLoraConfig(num_knots=num_knots, k_min=k_min, k_max=k_max, **options)
    except ValueError as error:
        assume("so far apart that fp32 can tell" not in str(error))
        raise
    z = k_min + (k_max - k_min) * (3 * torch.rand(shape) - 1)
    expected = z if config.extrapolation == "linear" else z.clamp(k_min, k_max)
    assert torch.equal(Spline(config)(z), expected)


@pytest.mark.parametrize("extrapolation", ["clamp", "linear"])
@pytest.mark.parametrize("method", ["piecewise", "soft"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_dropout": 0.3}, {"lora_bias": True}])
def test_at_the_identity_outputs_and_gradients_are_those_of_plain_lora(method, extrapolation, settings):
    spline_settings = {"interpolation_method": method, "extrapolation": extrapolation}
    targets = LAYERS if "lora_bias" not in settings else ["with_bias", "gpt2", "conv"]
    plain = adapted(LoraConfig, targets=targets, **settings)
    ours = adapted(LSLoraConfig, targets=targets, **settings, **spline_settings)
    x = torch.randn(20, 8)
    inputs = {}
    for spline in splines(ours):
        spline.register_forward_pre_hook(lambda module, args: inputs.__setitem__(module, args[0].abs().max()))

    results = []
    for model in (plain, ours):
        torch.manual_seed(1)  # for the dropout
        y = model(x)
        y.square().sum().backward()
        results.append((y, {n: p.grad for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n}))

    assert len(inputs) == len(targets) and all(0.03 < top < 3 for top in inputs.values())  # inside the grid, not zero
    (y_plain, gradients), (y_ours, ours_gradients) = results
    torch.testing.assert_close(y_ours, y_plain, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == ours_gradients.keys() and len(gradients) >= 2 * len(targets)
    for name, gradient in gradients.items():
        difference = (ours_gradients[name] - gradient).norm() / gradient.norm()
        assert difference < 1e-6, f"{name}: relative difference {difference}"


def test_the_layer_computes_the_equation():
    model = adapted(LSLoraConfig, k_min=-0.2, k_max=0.2).eval()
    layer = model.base_model.model.with_bias
    spline = layer.lora_spline["default"]
    spline.values = [-0.3, -0.05, 0.1, 0.0, 0.4]
    spline.input_scale, spline.output_scale = 1.3, 0.7
    x = torch.randn(30, 8)
    z = 2.0 * x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    t = (1.3 * z.clamp(-0.2, 0.2)).clamp(-0.2, 0.2)
    knots, values = [-0.2, -0.1, 0.0, 0.1, 0.2], [-0.3, -0.05, 0.1, 0.0, 0.4]
    phi = torch.zeros_like(t)
    for i in range(4):
        inside = (t >= knots[i]) & ((t < knots[i + 1]) | (i == 3))
        share = (t - knots[i]) / 0.1
        phi = torch.where(inside, (1 - share) * values[i] + share * values[i + 1], phi)
    expected = layer.base_layer(x) + 0.7 * phi
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert (z.abs() > 0.2).any() and (z.abs() < 0.2).any()


def test_a_fresh_adapter_leaves_the_base_model_as_it_is():
    net = Net()
    x = torch.randn(5, 8)
    expected = net(x)
    model = get_peft_model(net, LSLoraConfig(target_modules=LAYERS))
    assert torch.equal(model(x), expected)


def test_properties_and_stored_parameters():
    spline = splines(adapted(LSLoraConfig, num_knots=7, k_min=-1.0, k_max=2.0))[0]
    assert {name: tuple(p.shape) for name, p in spline.named_parameters()} == {
        "weight": (7,),
        "input_scale_offset": (1,),
        "output_scale_offset": (1,),
    }
    torch.testing.assert_close(spline.grid, torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]))
    assert torch.equal(spline.values, spline.grid)
    assert spline.input_scale == 1 and spline.output_scale == 1
    before = spline.weight
    spline.values = spline.grid + 0.25
    spline.input_scale = torch.tensor([1.5])
    assert spline.weight is before and spline.weight.requires_grad
    torch.testing.assert_close(spline.weight.detach(), torch.full((7,), 0.25))
    assert spline.input_scale == 1.5
    with pytest.raises(ValueError, match=r"values must have shape \(7,\), got \(5,\)"):
        spline.values = torch.zeros(5)


def test_properties_are_fp32_whatever_the_default_dtype():
    spline = Spline(LSLoraConfig(learn_scales=False))
    torch.set_default_dtype(torch.float64)
    try:
        assert {t.dtype for t in (spline.grid, spline.values, spline.input_scale)} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


def test_fixed_scales_are_one_and_take_no_parameters(tmp_path):
    model = adapted(LSLoraConfig, learn_scales=False, num_knots=9)
    assert splines(model)[0].input_scale == splines(model)[0].output_scale == 1
    for spline in splines(model):
        assert [name for name, _ in spline.named_parameters()] == ["weight"]
        spline.values = spline.grid + torch.randn(9)
    for name in ("input_scale", "output_scale"):
        with pytest.raises(ValueError, match=f"{name} is fixed at 1 with learn_scales=False"):
            setattr(splines(model)[0], name, 2.0)
    free = adapted(LSLoraConfig, num_knots=9)
    for fixed, learned in zip(splines(model), splines(free), strict=True):
        learned.values = fixed.values
    x = torch.randn(20, 8)
    torch.testing.assert_close(model(x), free(x))
    model(x).sum().backward()
    assert all(spline.weight.grad.abs().sum() > 0 for spline in splines(model))
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path)(x), model(x))


def test_splines_are_counted_and_trained(capsys):
    plain, ours = adapted(LoraConfig), adapted(LSLoraConfig, num_knots=9)
    trainable = [model.get_nb_trainable_parameters()[0] for model in (plain, ours)]
    assert trainable[1] - trainable[0] == len(LAYERS) * (9 + 2)
    ours.print_trainable_parameters()
    assert f"{trainable[1]:,}" in capsys.readouterr().out
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    ours(torch.randn(10, 8)).square().mean().backward()
    optimizer.step()
    for spline in splines(ours):
        assert all((p != 0).any() for p in spline.parameters())


@pytest.mark.parametrize("settings", [{}, {"interpolation_method": "soft"}, {"extrapolation": "linear"}])
def test_saved_adapter_gives_equal_outputs_in_a_fresh_process(tmp_path, settings):
    net = Net()
    model = adapted(LSLoraConfig, net=copy.deepcopy(net), num_knots=6, k_min=-0.5, k_max=1.0, **settings).eval()
    for spline in splines(model):
        spline.values = spline.grid + torch.randn(6) * 0.1
        spline.input_scale, spline.output_scale = 1.2, 0.8
    x = torch.randn(7, 8)
    model.save_pretrained(tmp_path)
    torch.save({"net": net, "x": x, "y": model(x)}, tmp_path / "case.pt")
    script = (
        "import sys, torch, lslora\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from peft import PeftModel\n"
        "case = torch.load(sys.argv[1] + '/case.pt', weights_only=False)\n"
        "model = PeftModel.from_pretrained(case['net'], sys.argv[1]).eval()\n"
        "assert torch.equal(model(case['x']), case['y']), 'outputs differ'\n"
    )
    test_folder = __file__.rpartition("/")[0]
    command = [sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[2])\n" + script]
    done = subprocess.run([*command, str(tmp_path), test_folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_whole_model_pickles_in_a_fresh_process(tmp_path):
    model = adapted(LSLoraConfig).eval()
    x = torch.randn(3, 8)
    torch.save({"model": model, "x": x, "y": model(x)}, tmp_path / "whole.pt")
    script = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "import torch\n"
        "case = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(case['model'](case['x']), case['y']), 'outputs differ'\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "whole.pt"), __file__.rpartition("/")[0]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_merging_raises_and_leaves_the_model_alone():
    model = adapted(LSLoraConfig)
    x = torch.randn(3, 8)
    before = model(x)
    layer = model.base_model.model.with_bias
    for merge in (
        model.merge_and_unload,
        model.merge_adapter,
        layer.merge,
        lambda: layer.get_delta_weight("default"),
        lambda: model.add_weighted_adapter(["default"], [1.0], "mixed"),
    ):
        with pytest.raises(ValueError, match="LS-LoRA"):
            merge()
    assert not model.base_model.supports_lora_conversion()
    assert torch.equal(model(x), before)


def test_unload_and_disable_give_the_base_back():
    net, x = Net(), torch.randn(3, 8)
    expected = net(x)
    model = adapted(LSLoraConfig, net=net)
    assert not torch.equal(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert torch.equal(model.unload()(x), expected)


def test_several_adapters_keep_their_own_splines():
    model = adapted(LSLoraConfig).eval()
    model.add_adapter("other", LSLoraConfig(r=2, target_modules=["with_bias"], num_knots=3, init_lora_weights=False))
    layer = model.base_model.model.with_bias
    assert [len(layer.lora_spline[name].weight) for name in ("default", "other")] == [5, 3]
    assert not layer.lora_spline["other"].weight.requires_grad
    layer.lora_spline["other"].values = [1.0, 2.0, 3.0]
    x = torch.randn(4, 8)
    default = model(x)
    model.set_adapter("other")
    other = model(x)
    assert layer.lora_spline["other"].weight.requires_grad
    assert not torch.allclose(default, other)
    mixed = model(x, adapter_names=["default", "other", "__base__", "default"])
    torch.testing.assert_close(mixed[[0, 3]], default[[0, 3]], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mixed[1], other[1], rtol=1e-6, atol=1e-6)
    model.delete_adapter("other")
    assert list(layer.lora_spline) == ["default"]


def test_a_plain_lora_layer_takes_a_spline_adapter_too():
    """Injected behind peft's back, the adapter must not silently become plain LoRA."""
    from peft import inject_adapter_in_model

    net = inject_adapter_in_model(LoraConfig(target_modules=["with_bias"]), Net(), "plain")
    net = inject_adapter_in_model(LSLoraConfig(target_modules=["with_bias"]), net, "curved")
    assert isinstance(net.with_bias, LSLoraLayer)
    assert list(net.with_bias.lora_spline) == ["curved"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_spline_stays_in_fp32_whatever_is_cast(dtype):
    model = adapted(LSLoraConfig, net=Net().to(dtype))
    spline = splines(model)[0]
    spline.values = spline.grid + 1e-4 / 3
    kept = spline.weight.detach().clone()
    model.to(dtype)
    assert spline.weight.dtype == torch.float32
    assert torch.equal(spline.weight, kept)  # not even rounded on the way
    assert model(torch.randn(3, 8, dtype=dtype)).dtype == dtype

    for parameter in model.parameters():  # as TRL does before training a quantised model
        parameter.data = parameter.data.to(torch.bfloat16)
    model.train()
    assert {p.dtype for p in spline.parameters()} == {torch.float32}


def test_what_is_loaded_into_a_spline_that_was_cast_is_not_rounded():
    spline, kept = Spline(LSLoraConfig()), Spline(LSLoraConfig())
    kept.values = kept.grid + 1e-4 / 3
    for parameter in spline.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    spline.load_state_dict(kept.state_dict())
    assert spline.weight.dtype == torch.float32
    assert torch.equal(spline.weight, kept.weight)


def test_autocast_returns_the_dtype_of_the_base():
    model = adapted(LSLoraConfig)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(3, 8))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert splines(model)[0].weight.grad.dtype == torch.float32


def test_composed_classes_are_importable_by_name():
    from peft.tuners.lora import Linear

    import lslora.layer

    assert lslora.layer.LSLoraLinear is lslora_class(Linear)
    with pytest.raises(AttributeError):
        lslora.layer.LSLoraNothing  # noqa: B018


def test_deepcopy_and_low_cpu_mem_usage(tmp_path):
    model = adapted(LSLoraConfig).eval()
    x = torch.randn(3, 8)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    splines(model)[0].values = [0.0, 1.0, 2.0, 3.0, 4.0]
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(), tmp_path, low_cpu_mem_usage=True).eval()
    assert all(p.device.type == "cpu" for p in again.parameters())
    assert torch.equal(again(x), model(x))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)


def test_a_saved_adapter_loads_whatever_its_layers_are_called(tmp_path):
    """peft finds modules_to_save by their ending, and a base may have names that begin as LoRA's do."""

    def base():
        torch.manual_seed(0)
        net = nn.Sequential()
        net.add_module("lora_proj", nn.Linear(4, 4))
        net.add_module("lm_head", nn.Linear(4, 3))
        return net

    config = LSLoraConfig(r=2, target_modules=["lora_proj"], modules_to_save=["head"], init_lora_weights=False)
    model = get_peft_model(base(), config).eval()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    model.save_pretrained(tmp_path)
    x = torch.randn(5, 4)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path).eval()(x), model(x))


def test_experts_that_are_parameters_are_refused_and_not_left_out():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=32, num_local_experts=2, num_key_value_heads=2, **sizes)
    targets = ["q_proj", "w1", "w2", "w3"]
    plain = get_peft_model(MixtralForCausalLM(config), LoraConfig(target_modules=targets))
    assert any("experts" in name and "lora_A" in name for name, _ in plain.named_parameters())
    with pytest.raises(ValueError, match="'gate_up_proj'. are parameters of this model"):
        get_peft_model(MixtralForCausalLM(config), LSLoraConfig(target_modules=targets))
    get_peft_model(MixtralForCausalLM(config), LSLoraConfig(target_modules=["q_proj"]))


def test_shared_experts_are_layers_and_named_by_their_way():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 4, "kv_lora_rank": 4, "v_head_dim": 4}
    heads |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    groups = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
    }
    config = DeepseekV3Config(vocab_size=32, **sizes, **heads, **groups)
    named = ["o_proj", "shared_experts.up_proj", "shared_experts.down_proj"]
    model = get_peft_model(DeepseekV3ForCausalLM(config), LSLoraConfig(target_modules=named))
    adapted = {name.partition(".layers.0.")[2] for name, m in model.named_modules() if isinstance(m, LSLoraLayer)}
    assert adapted == {"self_attn.o_proj", "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj"}
    for other in ([*named, "gate_proj", "up_proj"], "all-linear"):
        with pytest.raises(ValueError, match="Name other layers"):
            get_peft_model(DeepseekV3ForCausalLM(config), LSLoraConfig(target_modules=other))


def test_saving_as_lora_of_twice_the_rank_is_refused(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LSLoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="has no splines: save without it"):
        model.save_pretrained(tmp_path / "new", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))


def test_hooks_on_all_modules_see_every_module():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LSLoraConfig(r=2, target_modules=["0"]))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(type(module)))
    try:
        model(torch.ones(1, 4))
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 3  # the base layer, A and B


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.5}, {"placement": "weight"}, {"calibration_steps": 2}])
@pytest.mark.parametrize("shape", [(8,), (4, 8), (2, 3, 8), (2, 2, 2, 8)])
def test_the_output_may_be_changed_in_place(shape, settings, bias):
    gradients = []
    for inplace in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 6, bias=bias), nn.ReLU(inplace=inplace))
        config = LSLoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **settings)
        model = get_peft_model(net, config)
        x = torch.randn(shape, requires_grad=True)
        model(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(there, here) for there, here in zip(*gradients, strict=True))
