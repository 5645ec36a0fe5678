"""What the pages show is what the code does: every Python block and every command runs, every link is checked.

Commands run as they stand there, with a tiny model in the place of the named ones and one step of training. Those that
need a GPU or a hub, and those that measure for hours, are checked for their scripts and options.
"""

import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig

from lslora import LSLoraConfig, embedded
from lslora.callback import COURSE, DIAGNOSTICS
from lslora.diagnostics import observe_occupancy, spline_records
from lslora.records import save_records
from tests import configuration

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
INNER_PAGES = [ROOT / name for name in ("CONTRIBUTING.md", "benchmarks/README.md", "dataset/README.md")]
DATA = ROOT / "dataset" / "commonsense_mini"
BASE = "microsoft/Phi-3-mini-4k-instruct"
HUB_TASKS = ("boolq,piqa", "gsm8k", "mmlu")  # of lm-evaluation-harness, whose options tests/test_lm_eval.py checks
ROW = '{"instruction": "Is it red?\\n\\nAnswer format: yes/no", "output": "the answer is yes", "answer": "yes"}'


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the pages name: a tiny Phi-3 where they name the real one, rows, and a trained adapter."""
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train([str(DATA / "test.jsonl")], trainers.WordLevelTrainer(special_tokens=["<eos>", "<unk>"]))
    config = Phi3Config(
        vocab_size=words.get_vocab_size(),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    Phi3ForCausalLM(config).save_pretrained(tmp_path / BASE)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    tokenizer.save_pretrained(tmp_path / BASE)
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(f"{ROW}\n" * 16, encoding="utf-8")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(BASE),
        LSLoraConfig(r=2, lora_alpha=1, target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained("outputs/mine")
    model.save_pretrained("outputs/recommended")
    with observe_occupancy(model) as occupancy:
        model(input_ids=torch.arange(8)[None])
    save_records(spline_records(model, occupancy=occupancy), f"outputs/mine/{DIAGNOSTICS}")
    Path("outputs/mine", COURSE).write_text('{"step": 1, "layers": {"a": [0.1, 0.0]}}\n', encoding="utf-8")
    return tmp_path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_blocks_run(page, workplace):
    rows = [{"input_ids": list(range(i, i + 8)), "labels": list(range(i, i + 8))} for i in range(8)]
    config = LSLoraConfig(r=2, target_modules="all-linear")
    namespace = {
        "model": AutoModelForCausalLM.from_pretrained(BASE),
        "dataset": Dataset.from_list(rows),
        "batches": [{"input_ids": torch.arange(24).reshape(3, 8)} for _ in range(10)],
        "args": SFTConfig(str(workplace / "trained"), max_steps=1, use_cpu=True, report_to="none"),
        "max_steps": 6,
    }
    if page.name == "troubleshooting.md":  # where the reader has a trained model
        namespace["model"] = get_peft_model(namespace["model"], config)
    for number, block in enumerate(blocks(page, "python"), start=1):
        exec(compile(block, f"{name_of(page)}, Python block {number}", "exec"), namespace)


def command_lines(page):
    """Every command in the bash blocks of a page; lines that a backslash joins are one, comments are left out."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield line.partition(" #")[0].strip(), words


def commands():
    """(page, words) of every command."""
    for page in PAGES + INNER_PAGES:
        for _, words in command_lines(page):
            if "=$(" not in words[0]:
                yield name_of(page), words


@pytest.fixture
def checkout(workplace, monkeypatch):
    """The workplace with the scripts and their data, the tiny model as the embedded one, and this very environment."""
    for script in (*ROOT.glob("*.py"), *ROOT.glob("*.sh"), ROOT / "constraints.txt"):
        shutil.copy(script, workplace)
    shutil.copytree(ROOT / "scripts", workplace / "scripts")
    shutil.copytree(ROOT / "dataset", workplace / "dataset")
    model = workplace / "cache" / embedded.FOLDER
    shutil.copytree(workplace / BASE, model)
    embedded._write_manifest(model)
    monkeypatch.setenv("LSLORA_CACHE", str(model.parent))
    venv = workplace / "venv"
    (venv / "bin").mkdir(parents=True)
    programs = Path(sys.executable).parent
    (venv / "bin" / "activate").write_text(f'PATH="{programs}:$PATH"\n', encoding="utf-8")
    shutil.copy(ROOT / "constraints.txt", venv / ".installed-train")
    monkeypatch.setenv("LSLORA_VENV", str(venv))
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return workplace


def runs_here(words):
    if "phi3" in words:
        return not torch.cuda.is_available()  # and says that it cannot run
    installs = "pip" in words
    this_very_test = "run_tests.sh" in words
    return not (installs or this_very_test or any(word.startswith(HUB_TASKS) for word in words))


@pytest.mark.parametrize("page", [page for page in PAGES if any(command_lines(page))], ids=name_of)
def test_commands_run(page, checkout):
    for block in blocks(page, "python") if page.name == "lm_evaluation_harness.md" else ():
        exec(compile(block, name_of(page), "exec"), {})  # writes the task that a command names
    for line, words in command_lines(page):
        if not runs_here(words):
            continue
        line = re.sub(r"\bADAPTER\b", "outputs/mine", re.sub(r"\bBASE\b(?!=)", BASE, line))
        if any(word.startswith("train_lslora") for word in words) and "--help" not in words:
            recipe = " smollm2" if words[-1] == "train_lslora.sh" else ""
            line += f"{recipe} --max_steps 1"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        if "phi3" in words:
            assert done.returncode == 2 and "the phi3 recipe cannot run here" in done.stderr, line
        else:
            assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"


def help_of(target):
    """What `--help` of a script or a module prints."""
    run = runpy.run_path if target.endswith(".py") else runpy.run_module
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as done:
        run(str(ROOT / target) if target.endswith(".py") else target, run_name="__main__")
    assert done.value.code == 0
    return printed.getvalue()


@pytest.mark.filterwarnings("ignore")  # that a module was imported before
def test_commands_name_scripts_and_options_that_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    asked = {}
    for page, words in commands():
        command, *rest = [word for word in words if not re.match(r"[A-Z_]+=", word)] or [None]
        if command in (None, "pip", "source"):
            continue
        target, *arguments = rest[1:] if rest[0] == "-m" else rest
        if command == "bash":
            assert (ROOT / target).is_file(), f"{page}: {target}"
            target = target.replace(".sh", ".py")
        assert command in ("bash", "python"), f"{page}: {words}"
        options = [word for word in arguments if word.startswith("--") and word != "--"]
        asked.setdefault(target, []).extend((page, option) for option in options)
    del asked["lslora.lm_eval"]  # hands all to another program; see test_lm_eval.py
    for target, options in asked.items():
        if options:
            monkeypatch.setattr(sys, "argv", [target, "--help"])
            known = help_of(target)
            for page, option in options:
                assert re.search(rf"(?<!\S){re.escape(option)}\b", known), f"{page}: {target} {option}"
        elif target.endswith(".py") and not (ROOT / target).is_file():
            assert (ROOT / target.replace(".py", ".sh")).is_file(), target


def test_links_lead_somewhere():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            if path.startswith("https:"):
                continue
            target = page.parent / path if path else page
            assert target.exists(), f"{name_of(page)}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings], link


def test_the_configuration_page_is_what_the_docstrings_say():
    assert configuration.PAGE.read_text(encoding="utf-8") == configuration.page()
