"""Saved adapters: whole ones load everywhere, damaged ones raise, and none becomes plain LoRA in silence."""

import copy
import json
import re
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.warning import PeftWarning
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BartConfig, BartForSequenceClassification, LlamaConfig, LlamaForCausalLM

from lslora import LSLoraConfig, Spline


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).eval()


def adapted(base=None, **settings):
    """Every tensor of the adapter is random, its grids are calibrated."""
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **settings}
    model = get_peft_model(base or llama(), LSLoraConfig(calibration_steps=1, task_type="CAUSAL_LM", **settings))
    for i, spline in enumerate(m for m in model.modules() if isinstance(m, Spline)):
        spline.values = spline.grid + torch.randn(5)
        spline.calibrate(0.1 + i)
    return model.eval()


IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture
def saved(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    return tmp_path, model(IDS).logits


def damage(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors, next(key for key in tensors if key.endswith("down_proj.lora_spline.weight")))
    save_file(tensors, path, metadata={"format": "pt"})


def drop(tensors, key):
    del tensors[key]


def rename(tensors, key):
    tensors[key.replace("weight", "values")] = tensors.pop(key)


def drop_all(tensors, key):
    for name in [name for name in tensors if "lora_spline" in name]:
        del tensors[name]


def drop_scale(tensors, key):
    del tensors[key.replace("weight", "grid_scale")]


def spoil(tensors, key):
    tensors[key][2] = float("nan")


def spoil_scale(tensors, key):
    tensors[key.replace("weight", "grid_scale")][0] = float("inf")


def widen(tensors, key):
    tensors[key] = torch.zeros(7)


DAMAGES = {
    drop: r"adapter_model.safetensors: the checkpoint has no .*down_proj.lora_spline.weight",
    rename: r"the checkpoint has .*down_proj.lora_spline.values, which its config does not know",
    drop_all: r"the checkpoint has no .*lora_spline.(weight|grid_scale|(in|out)put_scale_offset)",
    drop_scale: r"the checkpoint has no .*grid_scale",
    spoil: r"down_proj.lora_spline.weight must be finite, got nan",
    spoil_scale: r"grid_scale must be finite, got inf",
    widen: r"down_proj.lora_spline.weight must have the shape \(5\), got \(7,\)",
}


def load_with_peft(folder, low_cpu_mem_usage=False):
    return PeftModel.from_pretrained(llama(), folder, low_cpu_mem_usage=low_cpu_mem_usage)


def load_beside_another(folder):
    model = adapted(target_modules=["q_proj"])
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    return model


def load_with_transformers(folder):
    model = llama()
    model.load_adapter(folder)
    return model


LOADERS = [
    load_with_peft,
    lambda folder: load_with_peft(folder, low_cpu_mem_usage=True),
    load_beside_another,
    load_with_transformers,
]


@pytest.mark.parametrize("load", LOADERS)
def test_a_whole_checkpoint_gives_the_same_outputs(saved, load):
    folder, logits = saved
    assert torch.equal(load(folder)(IDS).logits, logits)


@pytest.mark.parametrize("damaging", DAMAGES)
@pytest.mark.parametrize("load", LOADERS)
def test_a_damaged_checkpoint_raises(saved, load, damaging):
    folder, _ = saved
    damage(folder, damaging)
    with pytest.raises(ValueError, match=DAMAGES[damaging]):
        load(folder)


@pytest.mark.parametrize(
    ("damaging", "message"),
    [
        (drop, "the checkpoint has no .*down_proj.lora_spline.default.weight"),
        (drop_scale, "the checkpoint has no .*grid_scale"),
        (spoil, "down_proj.lora_spline.default.weight must be finite, got .*nan"),
        (spoil_scale, r"grid_scale must be finite, got \[inf\]"),
        (widen, "size mismatch for .*down_proj.lora_spline.default.weight: must be .5,., got .7,."),
    ],
)
def test_a_damaged_state_dict_raises(saved, damaging, message):
    """Where there is no file to check: what a hub or a program hands over."""
    folder, _ = saved
    damage(folder, damaging)
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(adapted(), load_file(folder / "adapter_model.safetensors"))


def without_layer(tensors, key):
    for name in [name for name in tensors if "down_proj" in name]:
        del tensors[name]


def of_another_layer(tensors, key):
    for name in [name for name in tensors if "down_proj" in name]:
        tensors[name.replace("down", "up")] = tensors[name].clone()


def spoil_b(tensors, key):
    tensors[key.replace("lora_spline", "lora_B")][0] = float("nan")


@pytest.mark.parametrize(
    ("damaging", "message"),
    [
        (without_layer, "the checkpoint has no .*down_proj.lora_[AB].default.weight"),
        (of_another_layer, "the checkpoint has .*up_proj.lora.*, for which the model has no adapted layer"),
        (spoil_b, "down_proj.lora_B.*must be finite"),
    ],
)
@pytest.mark.parametrize("load", LOADERS[:3])
def test_other_layers_than_the_models_raise(saved, load, damaging, message):
    folder, _ = saved
    damage(folder, damaging)
    with pytest.raises(ValueError, match=message.replace("default", "(default|second)")):
        load(folder)


def test_a_state_dict_of_plain_lora_is_refused():
    model = adapted()
    tensors = {k: v for k, v in get_peft_model_state_dict(model).items() if "spline" not in k}
    with pytest.raises(ValueError, match="without it the adapter would be plain LoRA"):
        set_peft_model_state_dict(model, tensors)


def test_other_adapters_and_the_base_may_be_loaded_alone():
    model = adapted()
    model.add_adapter("other", LSLoraConfig(target_modules=["q_proj"]))
    before = copy.deepcopy(model.state_dict())
    higher = {name: tensor + 1 for name, tensor in get_peft_model_state_dict(model, adapter_name="default").items()}
    set_peft_model_state_dict(model, higher)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name] + (".default" in name), msg=name)
    base = {name: tensor * 2 for name, tensor in before.items() if "lora" not in name}
    model.load_state_dict(base, strict=False)
    for name, tensor in model.state_dict().items():
        expected = before[name] + 1 if ".default" in name else base.get(name, before[name])
        torch.testing.assert_close(tensor, expected, msg=name)


def test_embeddings_are_checked_too():
    net = nn.Sequential(nn.Embedding(5, 4))
    model = get_peft_model(copy.deepcopy(net), LSLoraConfig(target_modules=["0"]))
    tensors = get_peft_model_state_dict(model)
    key = next(key for key in tensors if key.endswith("lora_spline.weight"))
    with pytest.raises(ValueError, match="the checkpoint has no .*0.lora_spline.default.weight"):
        set_peft_model_state_dict(model, {k: v for k, v in tensors.items() if k != key})
    set_peft_model_state_dict(model, tensors)


@pytest.mark.parametrize("base", [lambda: nn.Embedding(5, 4), lambda: nn.Linear(5, 4)])
def test_an_adapter_whose_name_begins_like_anothers_loads_alone(base):
    model = get_peft_model(nn.Sequential(base()), LSLoraConfig(target_modules=["0"]), adapter_name="a")
    model.add_adapter("ab", LSLoraConfig(target_modules=["0"]))
    before = copy.deepcopy(model.state_dict())
    higher = {name: tensor + 1 for name, tensor in get_peft_model_state_dict(model, adapter_name="ab").items()}
    set_peft_model_state_dict(model, higher, adapter_name="ab")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] + bool(re.search(r"\.ab\b", name))), name


CONFIGS = st.fixed_dictionaries(
    {
        "r": st.integers(1, 9),
        "lora_alpha": st.integers(1, 64) | st.floats(-1e3, 1e3),
        "lora_dropout": st.floats(0, 1),
        "use_rslora": st.booleans(),
        "rank_pattern": st.sampled_from([{}, {"up_proj": 5}, {r".*\.0\.self_attn\.q_proj": 3, "embed_tokens": 4}]),
        "alpha_pattern": st.sampled_from([{}, {"q_proj": 3}, {"down_proj": 0.5}]),
        "target_modules": st.sampled_from(["all-linear", r".*\.(q_proj|up_proj)", ["q_proj", "embed_tokens"]]),
        "exclude_modules": st.sampled_from([None, ["gate_proj"], "v_proj"]),
        "modules_to_save": st.sampled_from([None, ["lm_head"]]),
        "bias": st.sampled_from(["none", "all", "lora_only"]),
        "init_lora_weights": st.sampled_from([True, False, "gaussian", "orthogonal"]),
        "num_knots": st.integers(2, 40),
        "k_min": st.floats(-1e6, -1e-6),
        "k_max": st.floats(1e-6, 1e6),
        "learn_scales": st.booleans(),
        "calibration_steps": st.integers(0, 3),
        "spline_reg_weight": st.floats(0, 1),
        "interpolation_method": st.sampled_from(["piecewise", "soft"]),
        "extrapolation": st.sampled_from(["clamp", "linear"]),
        "soft_temperature": st.floats(1e-6, 1e6),
        "placement": st.sampled_from(["output", "bottleneck", "weight"]),
    }
)


@given(config=CONFIGS, trained=st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_legal_config_comes_back_with_its_tensors(config, trained):
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        if config["init_lora_weights"] == "orthogonal":
            config["r"], config["rank_pattern"] = 2, {}  # peft wants an even rank that no layer is narrower than
        model = get_peft_model(llama(), LSLoraConfig(**config, task_type="CAUSAL_LM"))
        for number, spline in enumerate(m for m in model.modules() if trained and isinstance(m, Spline)):
            if spline.grid_scale is not None:
                spline.calibrate(0.1 + number)
            spline.values = spline.grid * 1.5
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(llama(), folder, is_trainable=True)
        expected, found = (get_peft_model_state_dict(m) for m in (model, again))
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
        saved = json.loads(Path(folder, "adapter_config.json").read_text())
        for name, value in again.peft_config["default"].to_dict().items():
            if name != "inference_mode":
                assert (sorted(value) if isinstance(value, set) else value) == (
                    sorted(saved[name]) if isinstance(value, set) else saved[name]
                )


def test_saving_pieces_for_the_whole_warns(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "whole")
    b = model.base_model.model.model.layers[0].mlp.down_proj.lora_B["default"].weight
    b.data = b.data.flatten()[:5]
    with pytest.warns(PeftWarning, match="1 LoRA tensor.*lora_B.*shards"):
        model.save_pretrained(tmp_path / "piece")


class Shared(nn.Module):
    """Holds a module under two names."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.net = nn.Sequential(self.encoder, nn.Linear(8, 3))

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_module_with_two_names_is_loaded_by_its_first(tmp_path, low_cpu_mem_usage):
    base, x = Shared(), torch.randn(4, 8)
    config = LSLoraConfig(r=2, target_modules=["encoder.0"], init_lora_weights=False)
    trained = get_peft_model(copy.deepcopy(base), config).eval()
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    torch.testing.assert_close(loaded(x), trained(x), rtol=0, atol=0)
    trained.load_adapter(tmp_path, "default")


def test_a_classifier_by_another_name_is_not_missed(tmp_path):
    settings = {"vocab_size": 40, "d_model": 16, "max_position_embeddings": 32, "num_labels": 3, "pad_token_id": 1}
    for side in ("encoder", "decoder"):
        settings |= {f"{side}_layers": 1, f"{side}_ffn_dim": 32, f"{side}_attention_heads": 2}
    base = BartForSequenceClassification(BartConfig(**settings))
    trained = get_peft_model(copy.deepcopy(base), LSLoraConfig(r=2, task_type="SEQ_CLS", init_lora_weights=False))
    trained.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 2]])
    found = PeftModel.from_pretrained(base, tmp_path).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, trained.eval()(input_ids=ids).logits)


def test_what_is_saved_whole_may_hold_infinities(tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
            self.head.register_buffer("mask", torch.full((8, 8), float("-inf")).triu(1))

        def forward(self, x):
            return (self.head(self.first(x)) + self.head.mask).softmax(-1)

    base, x = Masked(), torch.randn(8, 8)
    config = LSLoraConfig(r=2, target_modules=["first"], modules_to_save=["head"], init_lora_weights=False)
    trained = get_peft_model(copy.deepcopy(base), config).eval()
    trained.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path).eval()(x), trained(x), rtol=0, atol=0)
