"""Every field of the config is checked where it is made, and every LoRA option is taken or refused by name."""

import dataclasses

import pytest
from peft import LoraConfig, PeftConfig, PeftType

import lslora.config
from lslora import LSLoraConfig
from lslora.ops.spline import EXTRAPOLATIONS, INTERPOLATION_METHODS


def test_defaults_are_those_of_the_method():
    config = LSLoraConfig()
    own = {field.name for field in dataclasses.fields(LSLoraConfig)} - {f.name for f in dataclasses.fields(LoraConfig)}
    assert {name: getattr(config, name) for name in own} == {
        "placement": "output",
        "num_knots": 5,
        "k_min": -3.0,
        "k_max": 3.0,
        "learn_scales": True,
        "calibration_steps": 0,
        "spline_reg_weight": 0.01,
        "interpolation_method": "piecewise",
        "extrapolation": "clamp",
        "soft_temperature": 0.5,
    }
    assert config.peft_type == PeftType.LSLORA


def test_recommended_settings_keep_what_is_asked_for():
    config = LSLoraConfig.recommended(r=4, num_knots=5, target_modules=["q_proj"])
    assert (config.r, config.lora_alpha, config.num_knots, config.target_modules) == (4, 40, 5, {"q_proj"})
    assert LSLoraConfig.recommended(r=4, lora_alpha=8).lora_alpha == 8
    assert LSLoraConfig.recommended().calibration_steps > 0
    assert LSLoraConfig.recommended(use_rslora=True).use_rslora and not LSLoraConfig.recommended().use_rslora
    with pytest.raises(ValueError, match="num_knots must be at least 2, got 1"):
        LSLoraConfig.recommended(num_knots=1)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_knots": 1}, ValueError, "num_knots must be at least 2, got 1"),
        ({"num_knots": 5.0}, TypeError, "num_knots must be an int, got 5.0"),
        ({"num_knots": True}, TypeError, "num_knots must be an int, got True"),
        ({"k_min": 3.0}, ValueError, "k_min must be smaller than k_max, got k_min=3.0 and k_max=3.0"),
        ({"k_min": 0.5}, ValueError, "0 must lie within k_min and k_max, .* got 0.5 and 3.0"),
        ({"k_max": -0.5}, ValueError, "0 must lie within k_min and k_max, .* got -3.0 and -0.5"),
        ({"k_min": float("nan")}, ValueError, "k_min must be finite, got nan"),
        ({"k_max": float("inf")}, ValueError, "k_max must be finite, got inf"),
        ({"k_max": "3"}, TypeError, "k_max must be a number, got '3'"),
        ({"spline_reg_weight": -0.1}, ValueError, "spline_reg_weight must not be negative, got -0.1"),
        ({"spline_reg_weight": float("nan")}, ValueError, "spline_reg_weight must be finite, got nan"),
        ({"soft_temperature": 0.0}, ValueError, "soft_temperature must be within .*, got 0.0"),
        ({"target_modules": 3}, TypeError, "target_modules must be names of modules, got 3"),
        ({"interpolation_method": "cubic"}, ValueError, "interpolation_method must be one of .*, got 'cubic'"),
        ({"extrapolation": "constant"}, ValueError, "extrapolation must be one of .*, got 'constant'"),
        ({"learn_scales": 1}, TypeError, "learn_scales must be True or False, got 1"),
        ({"calibration_steps": -1}, ValueError, "calibration_steps must be at least 0, got -1"),
        ({"calibration_steps": 1.5}, TypeError, "calibration_steps must be an int, got 1.5"),
        ({"num_knots": 4097}, ValueError, "num_knots must be at most 4096, got 4097"),
        ({"r": 65537}, ValueError, "r must be at most 65536, got 65537"),
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"r": 2.0}, TypeError, "r must be an int, got 2.0"),
        ({"rank_pattern": {"q_proj": 0}}, ValueError, "rank_pattern must be at least 1, got 0"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha must be finite, got nan"),
        ({"alpha_pattern": {"q_proj": "2"}}, TypeError, "alpha_pattern must be a number, got '2'"),
        ({"lora_dropout": 1.5}, ValueError, "lora_dropout must be within 0 and 1, got 1.5"),
        ({"k_max": 1e31}, ValueError, r"k_max must be within ±1e\+30, got 1e\+31"),
        ({"k_min": 2.9999999}, ValueError, "so far apart that fp32 can tell 5 knots"),
        ({"soft_temperature": 1e200}, ValueError, "soft_temperature must be within .*, got 1e\\+200"),
        ({"layer_replication": [[2, 1]]}, ValueError, "pairs with 0 ≤ start < end, got .2, 1."),
        ({"layer_replication": [[0, 600], [0, 600]]}, ValueError, "at most 1024 layers, got 1200"),
        ({"target_modules": ["../q_proj"]}, ValueError, "target_modules must hold names of modules, got '../q_proj'"),
        ({"alpha_pattern": {"(": 2}}, ValueError, "alpha_pattern must be a regular expression, got '\\('"),
        ({"placement": "input"}, ValueError, "placement must be one of .*, got 'input'"),
        ({"placement": "weight", "lora_bias": True}, ValueError, "lora_bias"),
        ({"use_dora": True}, ValueError, "use_dora is a LoRA variant"),
        ({"use_qalora": True}, ValueError, "use_qalora"),
        ({"velora_config": {}}, ValueError, None),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, ValueError, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights must be one of .*, got 'pissa'"),
        ({"init_lora_weights": "olora"}, ValueError, "got 'olora'"),
        ({"init_lora_weights": "mica"}, ValueError, "got 'mica'"),
        ({"target_parameters": ["weight"]}, ValueError, "target_parameters"),
        ({"megatron_config": {"a": 1}}, ValueError, "megatron_config"),
    ],
)
def test_wrong_settings_fail_at_construction(settings, error, message):
    with pytest.raises(error, match=message):
        LSLoraConfig(**settings)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_supported_initialisations(init):
    assert LSLoraConfig(init_lora_weights=init).init_lora_weights == init


def test_every_method_the_operation_knows_can_be_configured():
    assert lslora.config.INTERPOLATION_METHODS == INTERPOLATION_METHODS
    assert lslora.config.EXTRAPOLATIONS == EXTRAPOLATIONS
    for method in INTERPOLATION_METHODS:
        for extrapolation in EXTRAPOLATIONS:
            LSLoraConfig(interpolation_method=method, extrapolation=extrapolation)


def test_round_trip_through_a_file(tmp_path):
    config = LSLoraConfig(r=3, num_knots=9, k_min=-1.5, k_max=2, extrapolation="linear", target_modules=["q", "v"])
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is LSLoraConfig
    assert again.to_dict() == config.to_dict()
