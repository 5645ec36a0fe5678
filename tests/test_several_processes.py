"""Two real processes against one: losses, splines, and what they save (scripts/several_processes.py)."""

import importlib.util
from pathlib import Path

import pytest
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[1] / "scripts" / "several_processes.py"


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("several_processes", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def alone(script, tmp_path_factory):
    return script.run("alone", tmp_path_factory.mktemp("alone"))


def test_one_process_learns_and_calibrates(alone):
    assert len(set(alone["losses"])) == len(alone["losses"])
    assert alone["metrics"]["spline/deviation"] > 1e-4


@pytest.fixture(scope="module")
def alone_on_the_weight(script, tmp_path_factory):
    return script.run("alone", tmp_path_factory.mktemp("weight"), "weight")


@pytest.mark.parametrize("engine", ["fsdp1", "fsdp2", "zero3"])
def test_sharded_parameters_are_whole_for_the_weight_placement_too(script, alone_on_the_weight, engine, tmp_path):
    found = script.run(engine, tmp_path, "weight")
    assert found["losses"] == pytest.approx(alone_on_the_weight["losses"], abs=1e-5)
    assert found["metrics"] == pytest.approx(alone_on_the_weight["metrics"], rel=1e-4)


@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp2", "zero2", "zero3"])
def test_two_processes_do_what_one_does(script, alone, engine, tmp_path):
    found = script.run(engine, tmp_path)
    assert found["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)
    assert found["go_on"] == pytest.approx(alone["go_on"], abs=1e-5)
    saved = {name: t.shape for name, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert saved == {name: t.shape for name, t in get_peft_model_state_dict(script.fresh()).items()}
