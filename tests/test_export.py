"""Adapters exported as plain LoRA: exact where φ is linear, otherwise the best linear map, and loaded without us."""

import copy
import itertools
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from lslora import LSLoraConfig
from lslora.export import export_lora, observe_updates
from lslora.spline import splines_of


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).eval()


TARGETS = ["q_proj", "down_proj", "embed_tokens"]
ROWS = torch.randint(40, (30, 12), generator=torch.Generator().manual_seed(1))
HELD_OUT = torch.randint(40, (4, 12), generator=torch.Generator().manual_seed(2))


def adapted(base=None, curved=0.0, size=0.3, extrapolation="linear", **settings):
    """B is random, of this size; heights deviate from the line by `curved` times a fixed wave."""
    settings = {"r": 3, "lora_alpha": 7, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(base or llama(), LSLoraConfig(extrapolation=extrapolation, **settings)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                parameter.copy_(torch.randn(parameter.shape) * size)
    for spline in splines_of(model):
        spline.values = spline.grid + curved * torch.sin(2 * spline.grid)
    return model


def exported(model, folder, rank=None, base=None, **settings):
    with observe_updates(model, rank=rank) as moments, torch.no_grad():
        for row in ROWS:
            model(row[None])
    errors = export_lora(model, moments, folder, rank=rank, **settings)
    return PeftModel.from_pretrained(base or llama(), folder).eval(), errors


def logits(model):
    with torch.no_grad():
        return model(HELD_OUT).logits


@pytest.mark.parametrize(
    "settings", [{}, {"placement": "bottleneck"}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 5}}]
)
def test_linear_splines_are_exported_exactly(settings, tmp_path):
    model = adapted(**settings)
    for spline in splines_of(model):
        spline.values = 1.7 * spline.grid
        spline.input_scale, spline.output_scale = 0.8, 1.3
    plain, errors = exported(model, tmp_path)
    assert type(plain.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-6, atol=1e-6)
    assert max(errors.values()) < 1e-4  # float32 rounding, of updates much smaller than the grid's spacing
    assert (logits(plain) - logits(llama())).abs().max() > 0.01


@pytest.mark.parametrize("rank", [3, 8])
def test_linear_splines_are_exported_exactly_at_any_rank(rank, tmp_path):
    model = adapted()
    plain, _ = exported(model, tmp_path, rank=rank)
    config = plain.peft_config["default"]
    assert config.r == config.lora_alpha == rank
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [None, 6])
def test_embeddings_that_the_base_scales(rank, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=40, head_dim=8, num_key_value_heads=2, **sizes)).eval()
    model = adapted(copy.deepcopy(base), target_modules=["embed_tokens"])
    for spline in splines_of(model):
        spline.output_scale = 1.3
    plain, _ = exported(model, tmp_path, rank, base=base)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-6)


def test_a_fresh_adapter_adds_nothing(tmp_path):
    model = get_peft_model(llama(), LSLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    plain, errors = exported(model, tmp_path)
    assert set(errors.values()) == {0.0}
    assert torch.equal(logits(plain), logits(llama()))


def test_the_fit_is_least_squares(tmp_path):
    """Against torch's own solver on the rows of one layer, and no neighbour is better."""
    model = adapted(curved=0.3, size=20.0, extrapolation="clamp")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    seen = []
    layer.register_forward_hook(lambda m, args, out: seen.append((args[0], out - m.base_layer(args[0]))))
    plain, errors = exported(model, tmp_path, tolerance=1.0)
    x, u = (torch.cat([s[i].flatten(0, 1) for s in seen]).double() for i in range(2))
    h = x @ layer.lora_A["default"].weight.detach().double().T
    best = torch.linalg.lstsq(h, u).solution
    new = plain.base_model.model.model.layers[0].self_attn.q_proj
    torch.testing.assert_close(
        new.lora_B["default"].weight.double().T * new.scaling["default"], best, rtol=1e-4, atol=1e-5
    )
    error = (u - h @ best).norm() / u.norm()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    assert errors[name] == pytest.approx(error.item(), rel=1e-4)
    assert 0.01 < errors[name] < 1


def test_more_rank_is_never_worse(tmp_path):
    model = adapted(curved=0.5, size=20.0)
    errors = {rank: exported(model, tmp_path / str(rank), rank, tolerance=1.0)[1] for rank in (None, 3, 4, 16)}
    linear = [name for name in errors[None] if "embed" not in name]
    for name in linear:
        found = [errors[rank][name] for rank in (None, 3, 4, 16)]
        assert all(more <= less + 1e-6 for less, more in itertools.pairwise(found)), (name, found)
    assert any(errors[16][name] < 0.99 * errors[None][name] for name in linear)


def test_the_rest_of_the_adapter_goes_along(tmp_path):
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"], bias="none")
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    plain, _ = exported(model, tmp_path)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-6, atol=1e-6)


def test_peft_alone_loads_it(tmp_path):
    model = adapted()
    exported(model, tmp_path / "adapter")
    llama().save_pretrained(tmp_path / "base")
    torch.save((HELD_OUT, logits(model)), tmp_path / "expected.pt")
    code = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
ids, expected = torch.load(f"{folder}/expected.pt")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(f"{folder}/base"), f"{folder}/adapter").eval()
torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
assert "lslora" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and "num_knots" not in config
    assert not [key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "spline" in key]


def test_tied_embeddings_are_exported(tmp_path):
    def tied():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=True, **sizes)).eval()

    model = adapted(tied(), target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    plain, errors = exported(model, tmp_path, base=tied())
    assert max(errors.values()) < 1e-5
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)


def test_an_error_above_the_tolerance_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"within 0\.01 of the trained ones, relative; that of base_model.* is 0\.\d+ away"
    ):
        exported(adapted(size=20.0, extrapolation="clamp"), tmp_path / "new", tolerance=0.01)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("tolerance", [-0.1, float("nan")])
def test_a_tolerance_is_a_number_that_an_error_can_be_within(tmp_path, tolerance):
    with pytest.raises(ValueError, match=f"tolerance must be at least 0, got {tolerance}"):
        exported(adapted(), tmp_path / "new", tolerance=tolerance)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"placement": "weight", "target_modules": ["q_proj"]}, "merge_and_unload"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias must be False"),
    ],
)
def test_what_has_no_plain_form_is_refused(settings, message):
    with pytest.raises(ValueError, match=message), observe_updates(adapted(**settings)):
        pass


def test_other_adapters_and_models_in_training_are_refused():
    model = adapted()
    with pytest.raises(ValueError, match="eval mode"), observe_updates(model.train()):
        pass
    with (
        pytest.raises(ValueError, match="rank must be at least the adapter's, 3, got 2"),
        observe_updates(model.eval(), rank=2),
    ):
        pass
    plain = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).eval()
    with pytest.raises(ValueError, match="must be an LS-LoRA adapter, got LoraConfig"), observe_updates(plain):
        pass
    convolution = get_peft_model(nn.Sequential(nn.Conv1d(2, 3, 2)), LSLoraConfig(target_modules=["0"])).eval()
    with pytest.raises(ValueError, match="is a convolution"), observe_updates(convolution):
        pass


def test_calibration_must_reach_every_layer_and_have_tokens_enough(tmp_path):
    model = adapted()
    with observe_updates(model) as moments, torch.no_grad():
        model(ROWS[:2])
    with pytest.raises(ValueError, match="10 tokens a feature, 30 in all, got 24"):
        export_lora(model, moments, tmp_path)
    moments.popitem()
    with pytest.raises(ValueError, match="every adapted layer must be called"):
        export_lora(model, moments, tmp_path)
    assert not list(tmp_path.iterdir())
