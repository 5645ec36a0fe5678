"""What is published: built from what git knows, complete, and able to train where nothing else of this folder is."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
THREE_STEPS = """
import sys
import torch
import lslora
from lslora import LSLoraConfig
from lslora.callback import SplineCallback
from lslora.report import write_report
from lslora.training import SplineTrainerMixin
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

assert lslora.__file__.startswith(sys.argv[1]), lslora.__file__

class SplineTrainer(SplineTrainerMixin, Trainer): ...

sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
base = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
model = get_peft_model(base, LSLoraConfig(r=2, target_modules="all-linear"))
rows = [{"input_ids": list(range(i, i + 8)), "labels": list(range(i, i + 8))} for i in range(8)]
args = TrainingArguments("out", max_steps=3, logging_steps=1, use_cpu=True, report_to="none")
trainer = SplineTrainer(model, args, train_dataset=rows, spline_lr=0.01, callbacks=[SplineCallback()])
trainer.train()
trainer.save_model()
trainer.save_state()
assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)), "out")
print(write_report("out"), trainer.state.global_step)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the sdist, and the wheel that is built from it, out of what git knows of (changes included)."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    stash = subprocess.run(["git", "stash", "create"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    archive = subprocess.run(
        ["git", "archive", stash.strip() or "HEAD"], cwd=ROOT, check=True, capture_output=True
    ).stdout
    subprocess.run(["tar", "-x", "-C", source], input=archive, check=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source]
    subprocess.run([str(c) for c in command], check=True, capture_output=True)
    return folder


def test_the_metadata_is_fit_for_an_index(built):
    dist = sorted(map(str, (built / "dist").iterdir()))
    assert [Path(path).suffixes[-1] for path in dist] == [".whl", ".gz"]
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *dist], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout


def test_the_wheel_holds_the_package_and_nothing_else(built):
    (wheel,) = (built / "dist").glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = ROOT / "src" / "lslora"
    tracked = subprocess.run(["git", "ls-files", "."], cwd=package, check=True, capture_output=True, text=True).stdout
    assert names == {f"lslora/{line}" for line in tracked.splitlines()}
    assert {"lslora/py.typed", "lslora/ops/cpu.c", "lslora/report.html.jinja"} <= names
    (sdist,) = (built / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/src/lslora/ops/cpu.c") for name in archive.getnames())


def test_it_trains_three_steps_elsewhere(built, tmp_path):
    """The installed wheel, in a process that starts in an empty folder and finds this one's package later at most."""
    (wheel,) = (built / "dist").glob("*.whl")
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel]
    subprocess.run([str(c) for c in install], check=True, capture_output=True)
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", THREE_STEPS, str(target)],
        cwd=work, env=os.environ | {"PYTHONPATH": str(target)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "out/report.html 3"
