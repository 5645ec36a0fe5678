"""Registration with peft: in memory, once, on every supported Python, and only with peft versions that work."""

import enum
import hashlib
import pickle
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import lslora
from lslora.registry import add_enum_member, check_peft_version, register


def test_tables_of_peft():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["LSLORA"] is lslora.LSLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LSLORA] is lslora.LSLoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LSLORA] == "lora_"


def test_registering_twice_changes_nothing():
    members = list(PeftType)
    register()
    assert list(PeftType) == members


def test_added_member_behaves_like_a_defined_one():
    class Defined(str, enum.Enum):  # noqa: UP042  (as peft defines its own)
        A = "A"
        B = "B"

    class Extended(str, enum.Enum):  # noqa: UP042
        A = "A"

    add_enum_member(Extended, "B")
    for enumeration in (Defined, Extended):
        member = enumeration.B
        assert member is enumeration("B") is enumeration["B"]
        assert (member.name, member.value, member == "B", hash(member) == hash("B")) == ("B", "B", True, True)
        assert list(enumeration) == [enumeration.A, member] and len(enumeration) == 2
        assert "B" in enumeration.__members__ and isinstance(member, enumeration)
        assert {member: 1}["B"] == 1
        with pytest.raises(ValueError, match="is not a valid"):
            enumeration("C")
    assert repr(Extended.B) == repr(Defined.B).replace("Defined", "Extended")
    assert vars(Extended.B).keys() == vars(Defined.B).keys()
    assert pickle.loads(pickle.dumps(PeftType.LSLORA)) is PeftType.LSLORA


@pytest.mark.parametrize("version", ["0.21.0", "0.21.2", "0.21.5.dev0"])
def test_supported_peft_versions(version):
    check_peft_version(version)


@pytest.mark.parametrize("version", ["0.20.9", "0.22.0", "0.22.0.dev0", "1.0", "0.2"])
def test_other_peft_versions_are_refused_with_those_that_work(version):
    with pytest.raises(ImportError, match=f"works with peft <0.22,>=0.21, but peft {version} is installed"):
        check_peft_version(version)


def test_importing_changes_no_file_of_peft():
    files = [Path(file.locate()) for file in distribution("peft").files if file.suffix == ".py"]

    def digest():
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]

    before = digest()
    assert len(before) > 100
    code = (
        "import lslora, importlib; importlib.reload(lslora); from peft import PeftType; print(PeftType.LSLORA.value)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "LSLORA\n", done.stderr
    assert digest() == before


def test_hotswap_refuses_adapters_of_another_grid(tmp_path):
    from peft import get_peft_model
    from peft.utils.hotswap import hotswap_adapter
    from torch import nn

    def save(folder, **settings):
        model = get_peft_model(
            nn.Sequential(nn.Linear(3, 3)),
            lslora.LSLoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **settings),
        )
        spline = model.base_model.model[0].lora_spline["default"]
        spline.values = spline.grid * 2
        model.save_pretrained(folder)

    model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), lslora.LSLoraConfig(r=2, target_modules=["0"]))
    save(tmp_path / "same")
    hotswap_adapter(model, tmp_path / "same", "default")
    spline = model.base_model.model[0].lora_spline["default"]
    assert (spline.values == spline.grid * 2).all()
    for name, value in (("k_max", 4.0), ("placement", "weight"), ("learn_scales", False), ("calibration_steps", 3)):
        save(tmp_path / name, **{name: value})
        with pytest.raises(ValueError, match=name):
            hotswap_adapter(model, tmp_path / name, "default")


def test_hotswap_brings_the_grid_along(tmp_path):
    import torch
    from peft import get_peft_model
    from peft.utils.hotswap import hotswap_adapter
    from torch import nn

    def adapted():
        torch.manual_seed(0)
        config = lslora.LSLoraConfig(r=2, target_modules=["0"], init_lora_weights=False, calibration_steps=3)
        return get_peft_model(nn.Sequential(nn.Linear(3, 3)), config)

    waiting, calibrated = adapted(), adapted()
    spline = calibrated.base_model.model[0].lora_spline["default"]
    spline.calibrate(0.1)
    spline.values = spline.grid * 2
    calibrated.save_pretrained(tmp_path)
    x = torch.randn(5, 3)
    waiting.eval()(x)
    assert not torch.allclose(waiting(x), calibrated(x))
    hotswap_adapter(waiting, tmp_path, "default")
    torch.testing.assert_close(waiting(x), calibrated(x))
