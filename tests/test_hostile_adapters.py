"""Adapters may come from anyone: what is not as it says is refused, before memory is spent and without running it."""

import importlib.util
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lslora import LSLoraConfig

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import eval_lslora  # noqa: E402
import export_lslora  # noqa: E402
import train_lslora  # noqa: E402
from tests.torture import adapters, folders  # noqa: E402

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by Linux's means")
CONFIG, WEIGHTS, PICKLE = folders.CONFIG, folders.WEIGHTS, "adapter_model.bin"


@linux_only
@pytest.mark.parametrize("name", adapters.CASES)
def test_made_by_hand(name, tmp_path):
    assert adapters.run_by_hand(name, tmp_path / "adapter") == "refused"


@linux_only
def test_made_by_chance(tmp_path):
    found = []
    for number in range(200):
        folders.write(tmp_path, *adapters.mutant(number, 1))
        found.append(adapters.verdict(tmp_path).partition(":")[0])
    assert set(found) <= set(adapters.OUTCOMES)
    assert found.count("loaded") > 5 and found.count("refused") > 100


@linux_only
def test_the_legal_one_loads_and_the_check_sees_what_is_wrong(tmp_path):
    folders.write(tmp_path, *folders.legal())
    assert folders.outcome(tmp_path) == "loaded"
    model = PeftModel.from_pretrained(folders.tiny(), tmp_path)
    config, weights = folders.legal()
    folders.check_consistent(model, config, weights)
    with pytest.raises(AssertionError, match="k_max is 3.0, not 4.0"):
        folders.check_consistent(model, config.replace(b'"k_max": 3.0', b'"k_max": 4.0'), weights)
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight[0, 0] += 1
    with pytest.raises(AssertionError, match="lora_B.default.weight differs"):
        folders.check_consistent(model, config, weights)


@linux_only
def test_memory_is_limited():
    with pytest.raises(RuntimeError, match="can't allocate memory"), folders.limited_memory():
        torch.empty(2 * folders.ALLOWANCE, dtype=torch.uint8)


def test_main_counts_and_tells(capsys, monkeypatch):
    monkeypatch.setattr(adapters, "CASES", {"a number": adapters.CASES["a number"]})
    assert adapters.main(["--fuzzed", "3"]) == 0
    assert "by hand    refused         1" in capsys.readouterr().out
    monkeypatch.setitem(adapters.CASES, "legal", (lambda folder: folders.write(folder, *folders.legal()), "nothing"))
    assert adapters.main(["--fuzzed", "0"]) == 1
    assert "legal: was loaded" in capsys.readouterr().err


@linux_only
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_coverage_finds_nothing():
    command = [sys.executable, "-m", "tests.torture.fuzz_adapters", "tests/torture/corpus/adapters"]
    done = subprocess.run([*command, "-max_total_time=10"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


# The ways in that do not read the config beside the tensors, or read more than a folder.


def evil(folder):
    """What is written in the place of weights, and where it would show."""
    return pickle.dumps(adapters.Evil(folder / "unpickled"))


@pytest.mark.parametrize("name", [PICKLE, WEIGHTS])
def test_no_pickle_goes_into_an_adapter_that_is_there(name, tmp_path):
    model = get_peft_model(folders.tiny(), LSLoraConfig(r=2, target_modules=["0", "1"], calibration_steps=1))
    (tmp_path / name).write_bytes(evil(tmp_path))
    with pytest.raises(ValueError, match=name):
        model.load_adapter(tmp_path, "default")
    with pytest.raises(ValueError, match=name):
        PeftModel.from_pretrained(folders.tiny(), tmp_path, config=model.peft_config["default"])
    assert not (tmp_path / "unpickled").exists()


def test_tensors_of_other_shapes_do_not_go_into_an_adapter_that_is_there(tmp_path):
    folders.write(tmp_path, *folders.legal())
    model = get_peft_model(folders.tiny(), LSLoraConfig(r=3, target_modules=["0", "1"], calibration_steps=1))
    with pytest.raises(ValueError, match="must have the shape .3, any., got .2, 4."):
        model.load_adapter(tmp_path, "default")


@pytest.fixture
def hub(tmp_path):
    """What the cache holds after an adapter was fetched from a hub: (its folder, how to load it)."""
    repo = tmp_path / "models--someone--adapter"
    snapshot = repo / "snapshots" / ("0" * 40)
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    folders.write(snapshot, *folders.legal())
    return snapshot, {"model_id": "someone/adapter", "cache_dir": tmp_path}


def test_from_a_hub(hub):
    folder, arguments = hub
    model = PeftModel.from_pretrained(folders.tiny(), **arguments)
    folders.check_consistent(model, *folders.legal())
    model.load_adapter(adapter_name="second", **arguments)
    make, words = adapters.CASES["a legal r that the tensors have not"]
    make(folder)
    with pytest.raises(ValueError, match=words):
        PeftModel.from_pretrained(folders.tiny(), **arguments)


def test_no_pickle_from_a_hub(hub):
    folder, arguments = hub
    (folder / WEIGHTS).rename(folder / "elsewhere")
    with pytest.raises(ValueError, match=f"someone/adapter must have {WEIGHTS}: nothing else is read"):
        PeftModel.from_pretrained(folders.tiny(), **arguments)
    (folder / PICKLE).write_bytes(evil(folder))
    with pytest.raises(ValueError, match=PICKLE):
        PeftModel.from_pretrained(folders.tiny(), **arguments)
    assert not (folder / "unpickled").exists()


def test_a_subfolder(tmp_path):
    folders.write(tmp_path / "inner", *folders.legal())
    PeftModel.from_pretrained(folders.tiny(), tmp_path, subfolder="inner")
    (tmp_path / "inner" / PICKLE).write_bytes(evil(tmp_path))
    with pytest.raises(ValueError, match=PICKLE):
        PeftModel.from_pretrained(folders.tiny(), tmp_path, subfolder="inner")


def test_other_methods_load_as_before(tmp_path):
    model = get_peft_model(folders.tiny(), LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    changed = json.loads((tmp_path / CONFIG).read_text()) | {"from_a_later_version": 1}
    (tmp_path / CONFIG).write_text(json.dumps(changed))
    torch.save({"base_model.model.0.lora_A.weight": torch.ones(2, 4)}, tmp_path / PICKLE)
    (tmp_path / WEIGHTS).unlink()
    with pytest.warns(UserWarning, match="from_a_later_version"):
        again = PeftModel.from_pretrained(folders.tiny(), tmp_path)
    assert (again.base_model.model[0].lora_A["default"].weight == 1).all()


def test_splines_do_not_get_lost_in_a_plain_lora(tmp_path):
    settings = {"r": 2, "target_modules": ["0"]}
    model = get_peft_model(folders.tiny(), LSLoraConfig(**settings))
    model.save_pretrained(tmp_path)
    lost = "'default' must have an LSLoraConfig to be given splines (.*lora_spline.*), got a LoraConfig"
    with pytest.raises(ValueError, match=lost):
        PeftModel.from_pretrained(folders.tiny(), tmp_path, config=LoraConfig(**settings))
    plain = inject_adapter_in_model(LoraConfig(**settings), folders.tiny())
    with pytest.raises(ValueError, match=lost):
        set_peft_model_state_dict(plain, get_peft_model_state_dict(model))


@pytest.mark.parametrize("name", ["../up", "a/b", "with.dot", "", "nul\0", "a\\b"])
def test_an_adapters_name_is_no_path(name):
    with pytest.raises(ValueError, match="an adapter's name must have no dot, no slash and no control character"):
        get_peft_model(folders.tiny(), LSLoraConfig(target_modules=["0"]), adapter_name=name)


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))


@pytest.mark.parametrize("settings", [{"layer_replication": [[0, 5]]}, {"trainable_token_indices": [40]}])
def test_what_the_model_has_not_is_not_taken(settings):
    with pytest.raises(ValueError, match="must name layers and tokens that the model has"):
        get_peft_model(llama(), LSLoraConfig(r=2, target_modules=["q_proj"], **settings))


def test_tokens_must_have_a_row_each(tmp_path):
    config = LSLoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 5])
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(llama(), tmp_path)
    changed = json.loads((tmp_path / CONFIG).read_text()) | {"trainable_token_indices": [1, 5, 6]}
    (tmp_path / CONFIG).write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="trainable_tokens_delta must have a row for each of trainable_token_indices"):
        PeftModel.from_pretrained(llama(), tmp_path)


# The scripts.


@pytest.fixture
def workplace(tmp_path):
    """A tiny base model with a tokenizer, an adapter of it, and rows."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "yes": 2, "no": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    tokenizer.save_pretrained(tmp_path / "base")
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    config = LSLoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    row = {"instruction": "yes or no?", "input": "", "output": "yes", "answer": "yes"}
    (tmp_path / "rows.json").write_text(json.dumps([row] * 2), encoding="utf-8")
    return tmp_path


def evaluate(folder, *more):
    data, output = folder / "rows.json", folder / "results" / "out.json"
    arguments = ("--adapter", folder / "adapter", "--dataset", data, "--output", output, "--quiet", *more)
    return eval_lslora.main([str(a) for a in arguments])


def export(folder):
    data, output = folder / "rows.json", folder / "results"
    arguments = ("--adapter", folder / "adapter", "--dataset", data, "--output", output, "--quiet")
    return export_lslora.main([str(a) for a in arguments])


def train(folder):
    data, output = folder / "rows.json", folder / "results"
    arguments = ("--model_name", folder / "base", "--dataset_path", data, "--output_dir", output, "--quiet")
    return train_lslora.main([str(a) for a in (*arguments, "--max_steps", 1)])


def assert_refused(run, folder, capsys, words):
    assert run(folder) == 2
    message = capsys.readouterr().err
    assert re.search(words, message) and "Traceback" not in message
    assert not list((folder / "results").glob("*"))


SCRIPT_CASES = ["r of a billion", "k_min is NaN", "an unknown key", "no JSON", "a list", "no peft_type", "r as a text"]
SCRIPT_CASES += ["a peft_type of nobody", "100 MB of config", "nested 100,000 deep", "a header of 2**60 bytes"]
SCRIPT_CASES += ["a pickle", "a pickle by the name of safetensors", "no weights", "A with a NaN"]


@pytest.mark.parametrize("name", SCRIPT_CASES)
@pytest.mark.parametrize("run", [evaluate, export])
def test_scripts_refuse(run, name, workplace, capsys):
    shutil.rmtree(workplace / "adapter")
    make, words = adapters.CASES[name]
    make(workplace / "adapter")
    assert_refused(run, workplace, capsys, words)
    assert not (workplace / "adapter" / "unpickled").exists()


@pytest.mark.parametrize("run", [evaluate, export])
def test_scripts_refuse_an_adapter_of_another_model(run, workplace, capsys):
    """Its files agree with one another, only not with the base."""
    folders.write(workplace / "adapter", *folders.legal())
    config = json.loads((workplace / "adapter" / CONFIG).read_text())
    config["base_model_name_or_path"] = str(workplace / "base")
    (workplace / "adapter" / CONFIG).write_text(json.dumps(config))
    assert_refused(run, workplace, capsys, "has no|no adapted layer|not found in the base model|not supported")


def test_plain_lora_is_evaluated_and_not_exported_and_its_pickle_is_neither(workplace, capsys):
    base = LlamaForCausalLM.from_pretrained(workplace / "base")
    shutil.rmtree(workplace / "adapter")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(workplace / "adapter")
    assert_refused(export, workplace, capsys, "must be an LS-LoRA adapter, got LoraConfig")
    assert evaluate(workplace) == 0
    shutil.rmtree(workplace / "results")
    torch.save({"x": torch.ones(1)}, workplace / "adapter" / PICKLE)
    for run in (evaluate, export):
        assert_refused(run, workplace, capsys, f"{PICKLE}: an adapter must be saved as")


def test_auto_class(workplace):
    folder = workplace / "adapter"
    assert AutoPeftModelForCausalLM.from_pretrained(folder).peft_config["default"].r == 2
    (folder / PICKLE).write_bytes(evil(folder))
    with pytest.raises(ValueError, match=PICKLE):
        AutoPeftModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=PICKLE):
        PeftConfig.from_pretrained(folder)
    assert not (folder / "unpickled").exists()


# Code beside a model.


@pytest.mark.parametrize("model_type", ["llama", "of_its_own"])
@pytest.mark.parametrize("run", [train, evaluate, export])
def test_code_beside_a_model_does_not_run(run, model_type, workplace, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # transformers would ask
    ran = workplace / "ran"
    (workplace / "base" / "modeling_evil.py").write_text(
        f"import os\nos.mkdir({str(ran)!r})\nfrom transformers import LlamaConfig as EvilConfig\n"
        "from transformers import LlamaForCausalLM as Evil\nfrom transformers import LlamaTokenizer as EvilTokenizer\n"
    )
    path = workplace / "base" / "config.json"
    auto_map = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"}
    config = json.loads(path.read_text()) | {"model_type": model_type, "auto_map": auto_map}
    path.write_text(json.dumps(config))
    tokenizer = workplace / "base" / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": ["modeling_evil.EvilTokenizer", "modeling_evil.EvilTokenizer"]}
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"auto_map": auto_map}))
    if model_type == "llama":  # transformers has it itself
        assert run(workplace) == 0
    else:
        assert_refused(run, workplace, capsys, "contains custom code")
    assert not ran.exists()


def test_no_file_trusts_remote_code():
    files = [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    files += [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").rglob("*.ipynb")]
    assert len(files) > 30
    for path in files:
        for found in re.findall(r"trust_remote_code\S*", path.read_text(encoding="utf-8")):
            assert re.match(r"trust_remote_code=False\b", found), f"{path}: {found}"
    asked = [*ROOT.glob("*.py"), *(ROOT / "src" / "lslora" / name for name in ("base_model.py", "lengths.py"))]
    text = "".join(path.read_text(encoding="utf-8") for path in asked)
    calls = re.findall(r"Auto\w+\.from_(?:pretrained|config)\(((?:[^()]|\([^()]*\))*)\)", text)
    assert len(calls) > 4 and all("trust_remote_code=False" in call for call in calls)
