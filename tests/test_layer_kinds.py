"""Every kind of base layer peft's LoRA knows: plain LoRA at the start, the equation later, or a refusal.

The oracle is peft's plain LoRA on the same layer with the same A and B: what it adds to the base layer's output is z.
"""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import model as lora_model
from torch import nn
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from lslora import LSLoraConfig, Spline
from lslora.ops.reference import Grid
from lslora.ops.reference import spline as reference

VALUES = [-0.9, -0.1, 0.05, 0.2, 0.6]
KNOTS = {"k_min": -0.5, "k_max": 0.5}


def tokens():
    return torch.randint(0, 9, (5, 3), generator=torch.Generator().manual_seed(4))


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


PLAIN_KINDS = {
    "Linear": (lambda: nn.Linear(8, 6), noise(5, 3, 8)),
    "Linear without bias": (lambda: nn.Linear(8, 6, bias=False), noise(5, 8)),
    "transformers' Conv1D": (lambda: Conv1D(6, 8), noise(5, 3, 8)),
    "Embedding": (lambda: nn.Embedding(9, 6), tokens()),
    "Embedding that scales": (lambda: Gemma3TextScaledWordEmbedding(9, 6, 0, embed_scale=2.5), tokens()),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), noise(5, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, (2, 3), stride=2), noise(5, 4, 9, 7)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 2, padding=1), noise(5, 4, 5, 4, 3)),
}


def bitsandbytes_8bit():
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False).to("cpu")


def bitsandbytes_4bit():
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to("cpu")


def torchao_int8():
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(nn.Linear(64, 64))
    quantization.quantize_(holder, quantization.Int8WeightOnlyConfig())
    return holder[0]


def hqq_4bit():
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
    return quantize.HQQLinear(nn.Linear(64, 64), config, compute_dtype=torch.float32, device="cpu")


# Where peft asks the model, not the layer, whether it is quantised.
FLAGS = {bitsandbytes_8bit: "is_loaded_in_8bit", bitsandbytes_4bit: "is_loaded_in_4bit"}
LAYER_NAMES = {
    "Linear8bitLt": bitsandbytes_8bit,
    "Linear4bit": bitsandbytes_4bit,
    "TorchaoLoraLinear": torchao_int8,
    "HqqLoraLinear": hqq_4bit,
}
QUANTISED_KINDS = {
    "bitsandbytes 8-bit": (bitsandbytes_8bit, noise(5, 64)),
    "bitsandbytes 4-bit": (bitsandbytes_4bit, noise(5, 64)),
    "torchao int8": (torchao_int8, noise(5, 64)),
    "HQQ 4-bit": (hqq_4bit, noise(5, 64)),
}
KINDS = PLAIN_KINDS | QUANTISED_KINDS


def eetq_layer_class(monkeypatch):
    """peft defines its EETQ layer only where EETQ is installed, which needs CUDA to build."""
    eetq = ModuleType("eetq")
    eetq.EetqLinear = type("EetqLinear", (nn.Linear,), {})
    monkeypatch.setitem(sys.modules, "eetq", eetq)
    monkeypatch.setattr("peft.import_utils.is_eetq_available", lambda: True)
    specification = importlib.util.find_spec("peft.tuners.lora.eetq")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.EetqLoraLinear


@pytest.fixture(params=["gptq.GPTQLoraLinear", "awq.AwqLoraLinear", "aqlm.AqlmLoraLinear", "eetq.EetqLoraLinear"])
def uninstallable(request, monkeypatch):
    """A plain linear layer that peft takes for one of a library that only installs beside CUDA."""
    module_name, class_name = request.param.split(".")
    if module_name == "eetq":
        layer_class = eetq_layer_class(monkeypatch)
    else:
        layer_class = getattr(importlib.import_module(f"peft.tuners.lora.{module_name}"), class_name)

    def dispatch(target, adapter_name, config, **kwargs):
        return layer_class(target, adapter_name, config=config, **kwargs)

    monkeypatch.setattr(lora_model, f"dispatch_{module_name}", dispatch)
    return layer_class


def adapted(make, config_class=LSLoraConfig, seed=0, **settings):
    """The same base layer, A and B whatever the configuration class."""
    torch.manual_seed(seed)
    net = nn.Sequential(make())
    setattr(net, FLAGS.get(make, "is_quantised"), True)
    torch.manual_seed(seed + 1)
    config = config_class(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False, **settings)
    return get_peft_model(net, config)


def layer_of(model):
    return model.base_model.model[0]


def bend(model, adapter_name="default"):
    for spline in (m for m in model.modules() if isinstance(m, Spline)):
        spline.values = VALUES
    return layer_of(model).lora_spline[adapter_name]


def phi(z):
    one = torch.ones(1)
    offsets = torch.tensor(VALUES) - torch.linspace(-0.5, 0.5, 5)
    grid = Grid(-0.5, 0.5)
    return reference(z, offsets, one, one, grid, interpolation_method="piecewise", soft_temperature=0.5)


def update(model, x):
    return model(x) - layer_of(model).base_layer(x)


@pytest.mark.parametrize("placement", ["output", "bottleneck"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_the_identity_it_is_plain_lora(kind, placement):
    make, x = KINDS[kind]
    plain, ours = adapted(make, LoraConfig), adapted(make, placement=placement, extrapolation="linear")
    assert type(layer_of(ours)).__name__ == f"LSLora{type(layer_of(plain)).__name__}"
    gradients = []
    for model in (plain, ours):
        model(x).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad and "spline" not in n})
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(("name", "make"), LAYER_NAMES.items())
def test_quantised_layers_are_those_of_peft(name, make):
    assert type(layer_of(adapted(make))).__name__ == f"LSLora{name}"


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_output_it_is_the_spline_of_loras_update(kind):
    make, x = KINDS[kind]
    ours = adapted(make, **KNOTS)
    bend(ours)
    scale = getattr(layer_of(ours).base_layer, "scalar_embed_scale", 1.0)
    z = update(adapted(make, LoraConfig), x) / scale
    assert (z.abs() > 0.5).any() and (z.abs() < 0.5).any()
    torch.testing.assert_close(update(ours, x), scale * phi(z), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "Embedding" not in kind])
def test_in_the_bottleneck_it_is_lora_with_the_spline_behind_a(kind):
    make, x = KINDS[kind]
    ours, plain = adapted(make, placement="bottleneck", **KNOTS), adapted(make, LoraConfig)
    bend(ours)
    layer_of(plain).lora_A["default"].register_forward_hook(lambda module, args, h: phi(h))
    torch.testing.assert_close(update(ours, x), update(plain, x), rtol=1e-4, atol=1e-4)


def test_in_the_bottleneck_of_an_embedding():
    make, x = KINDS["Embedding that scales"]
    ours = adapted(make, placement="bottleneck", **KNOTS)
    bend(ours)
    layer = layer_of(ours)
    expected = 2.5 * 2 * phi(layer.lora_embedding_A["default"].T[x]) @ layer.lora_embedding_B["default"].T
    torch.testing.assert_close(update(ours, x), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("Conv")])
def test_on_the_weight_it_is_the_spline_of_the_weights_update_and_merges(kind):
    make, x = KINDS[kind]
    ours = adapted(make, placement="weight", **KNOTS)
    bend(ours)
    delta = layer_of(adapted(make, LoraConfig)).get_delta_weight("default")
    scale = getattr(layer_of(ours).base_layer, "scalar_embed_scale", 1.0)
    expected = phi(delta)
    if kind == "transformers' Conv1D":
        expected = expected.T
    expected = scale * expected[x] if "Embedding" in kind else x @ expected.T
    torch.testing.assert_close(update(ours, x), expected, rtol=1e-4, atol=1e-4)
    if kind in PLAIN_KINDS:
        before = ours(x)
        torch.testing.assert_close(ours.merge_and_unload()(x), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bitsandbytes 8-bit", "bitsandbytes 4-bit", "HQQ 4-bit"])
def test_the_weight_placement_merges_into_quantised_weights_as_lora_does(kind):
    make, x = QUANTISED_KINDS[kind]
    plain, ours = adapted(make, LoraConfig), adapted(make, placement="weight", k_min=-50.0, k_max=50.0)
    before = plain(x)
    merged = plain.merge_and_unload()(x)
    rounding = (merged - before).abs().max()
    torch.testing.assert_close(ours.merge_and_unload()(x), merged)
    bent = adapted(make, placement="weight", **KNOTS)
    bend(bent)
    before = bent(x)
    assert (bent.merge_and_unload()(x) - before).abs().max() < 1.5 * rounding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", ["output", "bottleneck"])
def test_a_mixed_batch_is_its_rows_through_their_adapters(kind, placement):
    make, x = KINDS[kind]
    model = adapted(make, placement=placement, **KNOTS)
    for name in ("second", "third"):
        settings = {"r": 2, "lora_alpha": 6, "num_knots": 5, "init_lora_weights": False, "target_modules": ["0"]}
        model.add_adapter(name, LSLoraConfig(**settings, placement=placement, **KNOTS))
    bend(model)
    layer_of(model).lora_spline["second"].values = [-0.1, 0.3, 0.0, -0.3, 0.1]
    model.eval()
    names = ["third", "default", "__base__", "second", "default"]
    with torch.no_grad():
        mixed = model(x, adapter_names=names)
        for name in set(names) - {"__base__"}:
            model.set_adapter(name)
            rows = [i for i, wanted in enumerate(names) if wanted == name]
            alone = model(x)
            assert not torch.allclose(alone, layer_of(model).base_layer(x))
            torch.testing.assert_close(mixed[rows], alone[rows], rtol=1e-6, atol=1e-6)
        with model.disable_adapter():
            torch.testing.assert_close(mixed[2], model(x)[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_disabling_and_unloading_give_the_base_back(kind):
    make, x = KINDS[kind]
    model = adapted(make, **KNOTS)
    bend(model)
    base = layer_of(model).base_layer
    expected = base(x)
    assert not torch.equal(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert model.unload()[0] is base
    assert torch.equal(base(x), expected)


@pytest.mark.parametrize("placement", ["output", "bottleneck"])
def test_layers_of_libraries_that_need_cuda(uninstallable, placement):
    x = noise(5, 8)
    plain = adapted(lambda: nn.Linear(8, 6), LoraConfig)
    ours = adapted(lambda: nn.Linear(8, 6), placement=placement, **KNOTS)
    assert isinstance(layer_of(ours), uninstallable)
    bend(ours)
    expected = phi(update(plain, x))
    if placement == "bottleneck":
        layer_of(plain).lora_A["default"].register_forward_hook(lambda module, args, h: phi(h))
        expected = update(plain, x)
    torch.testing.assert_close(update(ours, x), expected, rtol=1e-5, atol=1e-5)
    with ours.disable_adapter():
        assert torch.equal(ours(x), layer_of(ours).base_layer(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.MultiheadAttention(4, 2), "LS-LoRA does not support nn.MultiheadAttention"),
        (lambda: nn.Conv2d(4, 6, 2), "placement='weight' does not support convolutions"),
    ],
)
def test_what_cannot_work_is_refused_and_the_base_is_as_it_was(make, message):
    net = nn.Sequential(make())
    kept = net[0]
    with pytest.raises(ValueError, match=message):
        get_peft_model(net, LSLoraConfig(target_modules=["0"], placement="weight"))
    assert net[0] is kept


@pytest.mark.parametrize("config_class", [LoraConfig, LSLoraConfig])
def test_layers_that_mambas_kernels_read_past_the_adapter_are_refused_as_peft_does(config_class):
    sizes = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8}
    model = Mamba2ForCausalLM(Mamba2Config(hidden_size=32, num_hidden_layers=1, vocab_size=40, **sizes))
    with pytest.raises(ValueError, match="Module 'out_proj' is incompatible with Mamba-based models"):
        get_peft_model(model, config_class(target_modules=["in_proj", "out_proj"]))
    get_peft_model(model, config_class(target_modules=["in_proj"]))


@pytest.mark.parametrize("class_name", ["TeLinear", "LoraParallelLinear"])
def test_layers_that_are_not_known_to_work_are_refused_by_name(class_name, monkeypatch):
    """Transformer Engine's and Megatron's add B A x without asking a variant."""
    from peft.tuners.lora.layer import Linear

    unknown = type(class_name, (Linear,), {"__module__": f"peft.tuners.lora.{class_name}"})

    def dispatch(target, adapter_name, config, **kwargs):
        return unknown(target, adapter_name, config=config, **kwargs)

    monkeypatch.setattr(lora_model, "dispatch_default", dispatch)
    with pytest.raises(ValueError, match=f"does not support base layers that peft adapts with .*{class_name}"):
        adapted(lambda: nn.Linear(8, 6))
