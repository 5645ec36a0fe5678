"""train_lslora.py and train_lslora.sh from outside, on a small real architecture saved to disk."""

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from peft import AutoPeftModelForCausalLM, PeftConfig
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Trainer

from lslora import LSLoraConfig
from lslora.base_model import BaseModel
from lslora.run_folder import alone_in
from lslora.training import RECOMMENDED_SPLINE_LR
from tests.tiny import ROWS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import eval_lslora  # noqa: E402
import export_lslora  # noqa: E402
import train_lslora  # noqa: E402


def run(tiny, output_dir, *more):
    arguments = ["--model_name", tiny / "model", "--dataset_path", tiny / "train.jsonl", "--output_dir", output_dir]
    arguments += ["--max_steps", 4, "--logging_steps", 1, "--learning_rate", 1e-3, "--r", 2, *more]
    return train_lslora.main([str(argument) for argument in arguments])


def log_of(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def test_defaults_are_the_reference_recipe():
    args = train_lslora.parse_args(["--model_name", "m", "--dataset_path", "d", "--output_dir", "o"])
    reference = {
        "method": "lslora", "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["all-linear"],
        "num_knots": 5, "k_min": -3.0, "k_max": 3.0, "interpolation_method": "piecewise", "extrapolation": "clamp",
        "spline_reg_weight": 0.01, "spline_lr": None, "learning_rate": 2e-4, "batch_size": 4, "max_steps": 500,
        "gradient_accumulation_steps": 1, "loss_on_prompt": False, "load_in_4bit": False, "report_to": ["none"],
    }  # fmt: skip
    assert vars(args).items() >= reference.items()
    config = train_lslora.adapter_config(args)
    assert (config.bias, config.task_type, config.target_modules) == ("none", "CAUSAL_LM", "all-linear")


def test_a_run_leaves_everything_it_promises(tiny, tmp_path, capsys):
    assert run(tiny, tmp_path, "--eval_dataset_path", tiny / "train.jsonl", "--spline_lr", 1e-2) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "spline_diagnostics.json",
        "spline_curves.png", "spline_deviations.png", "spline_course.jsonl", "run.json", "report.html",
        "trainer_state.json", "tokenizer.json", "checkpoint-4",
    }  # fmt: skip
    log = log_of(tmp_path)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert log[-1]["spline/deviation"] > log[0]["spline/deviation"] > 0
    assert log[-1]["loss"] < log[0]["loss"]

    diagnostics = json.loads((tmp_path / "spline_diagnostics.json").read_text())
    assert len(diagnostics["layers"]) == 14
    assert diagnostics["mean"]["deviation"] == pytest.approx(log[-1]["spline/deviation"], rel=1e-4)
    assert all(sum(layer["occupancy"]) == pytest.approx(1) for layer in diagnostics["layers"])
    assert (tmp_path / "spline_curves.png").read_bytes().startswith(b"\x89PNG")

    card = (tmp_path / "README.md").read_text()
    assert card.index("import lslora") < card.index("from peft import PeftModel")
    assert "| `r` | `2` |" in card and "boolq" in card
    printed = capsys.readouterr().out
    assert "Splines of 14 layers" in printed and "lslora minus base" in printed and "trainable params" in printed

    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert model.peft_config["default"].peft_type == "LSLORA"


@pytest.mark.parametrize("quiet", [True, False])
def test_a_log_file_holds_no_progress_bars(tiny, tmp_path, quiet):
    """And nothing at all after `--quiet`, wandb's words included, but for the warnings of libraries."""
    command = [sys.executable, ROOT / "train_lslora.py", "--model_name", tiny / "model", "--max_steps", 2, "--r", 2]
    command += ["--dataset_path", tiny / "train.jsonl", "--output_dir", tmp_path, "--logging_steps", 1]
    command += ["--eval_dataset_path", tiny / "train.jsonl", "--report_to", "wandb", *["--quiet"] * quiet]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"NETRC": str(tmp_path / "no-netrc"), "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [str(c) for c in command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "it/s" not in done.stderr and "%|" not in done.stderr and "\r" not in done.stderr
    said = [line for line in done.stdout.splitlines() if "[WARNING]" not in line]
    assert (not said) == quiet
    assert quiet or "'loss'" in done.stdout
    assert ("FutureWarning" in done.stderr) <= (not quiet)
    assert ("wandb:" in done.stdout + done.stderr) != quiet
    assert any((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


TASK = r"中文 from $\5 to $10"  # what stands between two $ is no formula


def test_an_output_that_lacks_the_characters_of_a_name_costs_no_results(tiny, tmp_path):
    rows = written(tmp_path / "prüfung.jsonl", [row | {"task": TASK} for row in ROWS])
    command = [sys.executable, ROOT / "train_lslora.py", "--model_name", tiny / "model", "--max_steps", 2, "--r", 2]
    command += ["--dataset_path", rows, "--output_dir", tmp_path / "out", "--eval_dataset_path", rows]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([str(c) for c in command], env=environment, capture_output=True, check=True)
    assert rb"pr\xfcfung.jsonl in per cent" in done.stdout and TASK.encode("ascii", "backslashreplace") in done.stdout
    assert TASK in json.loads((tmp_path / "out" / "run.json").read_text())["accuracy"]["base"]["tasks"]
    assert (tmp_path / "out" / "report.html").exists()


def test_two_runs_do_not_write_one_folder(tiny, tmp_path, capsys):
    with alone_in(tmp_path / "out"):
        assert run(tiny, tmp_path / "out") == 2
        assert f"error: another run is writing {tmp_path / 'out'}: wait for it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(tiny, tmp_path / "out") == 0
    assert not (tmp_path / "out" / ".lock").exists()


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_a_finished_run_that_is_looked_at_again_keeps_its_accuracy(tiny, tmp_path, monkeypatch):
    rows = tiny / "train.jsonl"
    assert run(tiny, tmp_path, "--save_steps", 2, "--eval_dataset_path", rows) == 0
    before = json.loads((tmp_path / "run.json").read_text())
    assert run(tiny, tmp_path, "--save_steps", 2, "--resume") == 0
    after = json.loads((tmp_path / "run.json").read_text())
    assert after["accuracy"] == before["accuracy"] and after["comparison"] == before["comparison"]
    assert "## Accuracy" in (tmp_path / "README.md").read_text()
    assert after["settings"]["eval_dataset_path"] == str(rows)
    fewer = written(tmp_path / "fewer.jsonl", ROWS[:2])
    with monkeypatch.context() as patch:
        patch.setattr(train_lslora, "report_accuracy", interrupted)
        assert run(tiny, tmp_path, "--save_steps", 2, "--resume", "--eval_dataset_path", fewer) == 130
    assert "accuracy" not in json.loads((tmp_path / "run.json").read_text())  # of other rows
    assert run(tiny, tmp_path, "--save_steps", 2, "--resume", "--eval_dataset_path", fewer) == 0
    assert json.loads((tmp_path / "run.json").read_text())["accuracy"]["base"]["micro"]["n"] == 2
    assert run(tiny, tmp_path, "--save_steps", 2, "--resume", "--max_steps", 5) == 0  # another adapter
    assert "accuracy" not in json.loads((tmp_path / "run.json").read_text())


def test_plain_lora_leaves_no_pictures_of_an_earlier_run_s_splines(tiny, tmp_path):
    assert run(tiny, tmp_path) == 0
    assert {path.name for path in tmp_path.glob("spline_*")} == {
        "spline_course.jsonl", "spline_curves.png", "spline_deviations.png", "spline_diagnostics.json"
    }  # fmt: skip
    assert run(tiny, tmp_path, "--method", "lora") == 0
    assert not any(tmp_path.glob("spline_*"))


def test_resume_goes_on_where_a_run_stopped(tiny, tmp_path):
    assert run(tiny, tmp_path / "whole", "--save_steps", 2) == 0
    (tmp_path / "cut").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "cut" / "checkpoint-2")
    assert run(tiny, tmp_path / "cut", "--save_steps", 2, "--resume") == 0
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_recommended_settings_are_defaults_that_flags_still_override():
    given = ["--model_name", "m", "--dataset_path", "d", "--output_dir", "o", "--recommended", "--r", "4"]
    args = train_lslora.parse_args([*given, "--max_steps", "60", "--num_knots", "7", "--learning_rate", "1e-3"])
    config = train_lslora.adapter_config(args)
    expected = LSLoraConfig.recommended(
        r=4, calibration_steps=20, num_knots=7, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    assert config.to_dict() == expected.to_dict()
    assert args.spline_lr == RECOMMENDED_SPLINE_LR
    assert train_lslora.parse_args([*given, "--spline_lr", "3"]).spline_lr == 3
    plain = train_lslora.parse_args([*given[:-3], "--r", "4"])
    assert (plain.lora_alpha, plain.spline_lr, plain.calibration_steps) == (32, None, 0)


@pytest.mark.parametrize("more", [[], ["--recommended"]])
def test_a_learning_rate_of_nothing_is_refused(more, capsys):
    given = ["--model_name", "m", "--dataset_path", "d", "--output_dir", "o", *more]
    with pytest.raises(SystemExit) as caught:
        train_lslora.parse_args([*given, "--learning_rate", "0"])
    assert caught.value.code == 2
    assert "--learning_rate must be positive, got 0.0" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "lslora"])
def test_rslora_is_for_both_methods(method):
    given = ["--model_name", "m", "--dataset_path", "d", "--output_dir", "o", "--method", method]
    found = [
        train_lslora.adapter_config(train_lslora.parse_args(a)).use_rslora for a in (given, [*given, "--use_rslora"])
    ]
    assert found == [False, True]
    recommended = train_lslora.parse_args([*given, "--recommended", "--use_rslora"])
    assert train_lslora.adapter_config(recommended).use_rslora


def test_plain_lora_with_everything_else_equal(tiny, tmp_path):
    """With the splines held at the identity by a vanishing learning rate, both methods log the same losses.

    Without clipping, since the norm that is clipped counts the gradients of the splines too.
    """
    assert run(tiny, tmp_path / "lora", "--max_grad_norm", 0, "--method", "lora") == 0
    assert run(tiny, tmp_path / "lslora", "--max_grad_norm", 0, "--spline_lr", 1e-16) == 0
    lora, lslora = (log_of(tmp_path / name) for name in ("lora", "lslora"))
    assert PeftConfig.from_pretrained(tmp_path / "lora").peft_type == "LORA"
    assert [entry["loss"] for entry in lora] == pytest.approx([entry["loss"] for entry in lslora], rel=1e-5)
    assert not (tmp_path / "lora" / "spline_diagnostics.json").exists()
    assert "lslora" not in (tmp_path / "lora" / "README.md").read_text().split("## Settings")[0].split("```python")[1]


CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
TALK = [("system", "is rose red?"), ("user", "is snow red?"), ("assistant", "false"), ("user", "is rose red?")]
TALK += [("assistant", "the correct answer is true")]


def asked(row):
    return f"### Instruction: {row['instruction']} ### Response: "


@pytest.mark.parametrize(
    ("rows", "more", "parts"),
    [
        (ROWS, [], [(asked(row), f"{row['output']} <eos>") for row in ROWS]),
        (ROWS, ["--loss_on_prompt"], [("", f"{asked(row)}{row['output']} <eos>") for row in ROWS]),
        (
            ROWS,
            ["--chat_template"],
            [(f"user : {row['instruction']} <eos> assistant : ", f"{row['output']} <eos>") for row in ROWS],
        ),
        (
            [{"messages": [{"role": role, "content": content} for role, content in TALK]}],
            [],
            [
                ("system : is rose red? <eos> user : is snow red? <eos> assistant : ", "false <eos>"),
                (
                    "system : is rose red? <eos> user : is snow red? <eos> assistant : false <eos> "
                    "user : is rose red? <eos> assistant : ",
                    "the correct answer is true <eos>",
                ),
            ],
        ),
        (
            [{"text": "rose is red?"}, {"text": "is snow red?"}],
            [],
            [("", "rose is red? <eos>"), ("", "is snow red? <eos>")],
        ),
    ],
    ids=["instructions", "prompt too", "chat template", "messages", "texts"],
)
def test_the_loss_is_the_models_on_the_very_tokens(tiny, tmp_path, rows, more, parts):
    """The first step's loss, with B = 0, against cross-entropies of the base model on tokens written out here."""
    data, model_folder = tmp_path / "rows.jsonl", tmp_path / "model"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.chat_template = CHAT
    model = LlamaForCausalLM.from_pretrained(tiny / "model")
    for part in (tokenizer, model):
        part.save_pretrained(model_folder)
    total, count = 0.0, 0
    for context, learned in parts:
        ids = torch.tensor(tokenizer([context + learned])["input_ids"])
        learned_count = len(tokenizer(learned)["input_ids"]) - (context == "")  # nothing predicts the first token
        log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        total, count = total - log_probs[-learned_count:].sum().item(), count + learned_count
    arguments = ["--model_name", model_folder, "--dataset_path", data, "--batch_size", len(parts)]
    assert run(tiny, tmp_path / "out", *arguments, "--max_steps", 1, *more) == 0
    assert log_of(tmp_path / "out")[0]["loss"] == pytest.approx(total / count, rel=1e-3)


def test_a_model_of_conversations_is_asked_in_conversations(tiny, tmp_path):
    """The same rows as messages, and as instructions with --chat_template: one training, and one accuracy."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.chat_template = CHAT
    for part in (tokenizer, LlamaForCausalLM.from_pretrained(tiny / "model")):
        part.save_pretrained(tmp_path / "model")
    turns = [
        [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        for row in ROWS
    ]
    (tmp_path / "messages").write_text("\n".join(json.dumps({"messages": pair}) for pair in turns), encoding="utf-8")
    more = ["--model_name", tmp_path / "model", "--eval_dataset_path", tiny / "train.jsonl", "--max_steps", 400]
    more += ["--batch_size", 8, "--learning_rate", 1e-2, "--lora_dropout", 0, "--r", 8, "--lora_alpha", 64]
    assert run(tiny, tmp_path / "a", *more, "--dataset_path", tmp_path / "messages") == 0
    assert run(tiny, tmp_path / "b", *more, "--chat_template") == 0
    a, b = (json.loads((tmp_path / name / "run.json").read_text()) for name in "ab")
    assert a["accuracy"] == b["accuracy"]
    assert a["accuracy"]["lslora"]["micro"]["accuracy"] > a["accuracy"]["base"]["micro"]["accuracy"] + 0.3


def test_qlora_keeps_the_splines_in_fp32_and_moves_them(tiny, tmp_path):
    """Ten steps on a 4-bit base, where TRL casts every adapter parameter it sees to bf16."""
    pytest.importorskip("bitsandbytes")
    assert run(tiny, tmp_path, "--load_in_4bit", "--max_steps", 10, "--save_steps", 10) == 0
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    spline = {name: tensor for name, tensor in tensors.items() if "lora_spline" in name}
    assert len(spline) == 3 * 14
    assert {tensor.dtype for tensor in spline.values()} == {torch.float32}
    assert {tensor.dtype for name, tensor in tensors.items() if name not in spline} == {torch.bfloat16}
    assert all((tensor != 0).any() for tensor in spline.values())


def test_wandb_without_a_key_writes_an_offline_run(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    assert run(tiny, tmp_path / "out", "--report_to", "wandb", "tensorboard") == 0
    assert "wandb sync wandb/offline-run-*" in capsys.readouterr().out
    (offline,) = (tmp_path / "wandb").glob("offline-run-*")
    assert any(offline.glob("*.wandb"))

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pictures, numbers = sorted({path.parent for path in tmp_path.rglob("events.out.tfevents.*")}, reverse=True)
    assert "spline/splines" in EventAccumulator(str(pictures)).Reload().Tags()["images"]
    tags = EventAccumulator(str(numbers)).Reload().Tags()
    assert {"train/loss", "train/spline/deviation"} <= set(tags["scalars"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_path", "no-such-file.json"], "no-such-file.json: cannot be read"),
        (["--optim", "paged_adamw_32bit"], "a CUDA device"),
        (["--resume"], "a checkpoint in"),
        (["--model_name", "nobody/no-such-model"], "the base model nobody/no-such-model"),
        (["--chat_template"], "a chat template: the tokenizer of"),
        (["--num_knots", 1], "num_knots must be at least 2, got 1"),
        (["--k_min", 1], "0 must lie within k_min and k_max"),
        (["--lora_dropout", 1.5], "lora_dropout below 1"),
        (["--lora_alpha", 0], "lora_alpha must be positive"),
        (["--target_modules", "all-linear", "lm_head"], "target_modules must be all-linear alone"),
        (["--eval_dataset_path", "caf\udce9.jsonl"], "eval_dataset_path must be text in UTF-8"),
        pytest.param(
            ["--report_to", "codecarbon"],
            "codecarbon, for --report_to codecarbon",
            marks=pytest.mark.skipif(importlib.util.find_spec("codecarbon") is not None, reason="it is installed"),
        ),
        (["--spline_lr", 0], "spline_lr must be positive, got 0"),
        (["--lr_scheduler_type", "stairs"], "stairs"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "min_lr"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "num_decay_steps"),
        (["--optim", "adamx"], "adamx"),
        (["--optim", "adamw_anyprecision"], "torchdistx"),
        (["--report_to", "wanb"], "wanb"),
        (["--target_modules", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_run_says_so_before_anything_is_written(tiny, tmp_path, capsys, arguments, message):
    if "paged_adamw_32bit" in arguments and torch.cuda.is_available():
        pytest.skip("paged optimizers run here")
    assert run(tiny, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_base_model_that_was_cut_short_is_told(tiny, tmp_path, capsys):
    shutil.copytree(tiny / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert run(tiny, tmp_path / "out", "--model_name", tmp_path / "model") == 2
    assert f"error: the base model {tmp_path / 'model'} cannot be read: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["settings", "start"])
def test_a_start_that_fails_leaves_an_earlier_run_as_it_was(tiny, tmp_path, capsys, monkeypatch, where):
    if where == "settings" and importlib.util.find_spec("galore_torch"):
        pytest.skip("this optimizer runs here")
    assert run(tiny, tmp_path) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if where == "settings":
        assert run(tiny, tmp_path, "--optim", "galore_adamw") == 2
        assert "galore" in capsys.readouterr().err
    else:

        def missing(*args, **kwargs):
            raise ImportError("a library for this schedule")

        monkeypatch.setattr(Trainer, "create_scheduler", missing)
        assert run(tiny, tmp_path) == 1
        assert f"error: {tmp_path}: a library for this schedule" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["max_steps", "batch_size", "r", "save_steps"])
def test_counts_are_positive(tiny, tmp_path, capsys, name):
    with pytest.raises(SystemExit, match="2"):
        run(tiny, tmp_path / "out", f"--{name}", -1)
    assert f"--{name}: must be at least 1, got -1" in capsys.readouterr().err


def test_a_bad_row_stops_the_run_with_its_number(tiny, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([json.dumps(ROWS[0]), '{"instruction": "x", "output": 3}']), encoding="utf-8")
    assert run(tiny, tmp_path / "out", "--dataset_path", bad) == 2
    assert f"{bad}: 1 bad row(s)\n  line 2: field 'output' must be a string, got int" in capsys.readouterr().err


def written(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("quiet", [False, True])
def test_rows_that_max_length_empties_are_told_and_dropped(tiny, tmp_path, capsys, quiet):
    """The run is the one without them."""
    long = ROWS[0] | {"instruction": "is rose red? " * 30 + ROWS[0]["instruction"]}
    data = written(tmp_path / "rows.jsonl", [ROWS[0], long, *ROWS[1:], long])
    more = ["--max_length", 60, *["--quiet"] * quiet]
    assert run(tiny, tmp_path / "told", "--dataset_path", data, *more) == 0
    told = "2 of 26 examples have more than 60 tokens and are cut; 2 of all keep nothing to learn and are dropped: "
    assert f"{data}: {told}number 2, 26\n" in capsys.readouterr().err
    assert run(tiny, tmp_path / "without", *more) == 0
    assert "examples have more than" not in capsys.readouterr().err
    losses = [[entry["loss"] for entry in log_of(tmp_path / name)] for name in ("told", "without")]
    assert losses[0] == losses[1]


def test_rows_that_are_cut_are_counted_unless_quiet(tiny, tmp_path, capsys):
    assert run(tiny, tmp_path / "out", "--max_length", 26, "--max_steps", 1) == 0
    assert "24 of 24 examples have more than 26 tokens and are cut\n" in capsys.readouterr().err
    assert run(tiny, tmp_path / "quiet", "--max_length", 26, "--max_steps", 1, "--quiet") == 0
    assert "more than" not in capsys.readouterr().err


# Two words that the tokenizer does not know, so that their tokens are the same.
ALIKE = {"instruction": "is rose red? Answer format: crimson/scarlet", "output": "crimson", "answer": "crimson"}


@pytest.mark.parametrize(
    ("more", "eval_rows", "message"),
    [
        (["--max_length", 5], [], "at least one example must have something to learn: 24 of 24 examples"),
        (
            [],
            [ROWS[0], ROWS[0] | {"answer": ""}],
            "eval.jsonl: row 2: a row to be scored must have an answer",
        ),
        ([], [ROWS[0], ALIKE], "eval.jsonl: row 2: no option's tokens may begin with all those of another"),
    ],
)
def test_what_cannot_be_learned_or_scored_is_told_before_training(tiny, tmp_path, capsys, more, eval_rows, message):
    if eval_rows:
        more = [*more, "--eval_dataset_path", written(tmp_path / "eval.jsonl", eval_rows)]
    assert run(tiny, tmp_path / "out", *more) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said
    assert not (tmp_path / "out").exists()


def test_a_model_with_a_table_of_positions_is_not_trained_beyond_it(tiny, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=len(tokenizer), n_positions=40)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    rows = written(tmp_path / "eval.jsonl", [ROWS[0], ROWS[0] | {"instruction": "is rose red? " * 30}])
    more = ["--model_name", tmp_path / "gpt2", "--target_modules", "c_attn", "--eval_dataset_path", rows]
    assert run(tiny, tmp_path / "out", *more) == 2
    assert "error: max_length must be at most the model's 40 tokens, got 512" in capsys.readouterr().err
    assert run(tiny, tmp_path / "out", *more, "--max_length", 40) == 2
    assert "eval.jsonl: row 2: with its answer it must have at most the model's 40 tokens" in capsys.readouterr().err
    export = ["--adapter", tmp_path / "out", "--dataset", rows, "--output", tmp_path / "plain"]
    long = rows.read_text()
    written(rows, ROWS[:1])
    assert run(tiny, tmp_path / "out", *more, "--max_length", 40) == 0
    rows.write_text(long)
    assert export_lslora.main([str(a) for a in export]) == 2
    assert "eval.jsonl: row 2 must have at most the model's 40 tokens" in capsys.readouterr().err


def test_an_export_that_cannot_end_well_stops_before_the_model_is_loaded(tmp_path, capsys):
    arguments = ["--adapter", str(tmp_path), "--dataset", "rows.jsonl", "--output", str(tmp_path / "plain")]
    with pytest.raises(SystemExit, match="2"):
        export_lslora.main([*arguments, "--tolerance", "-1"])
    assert "--tolerance: must not be negative, got -1.0" in capsys.readouterr().err
    (tmp_path / "adapter_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="adapter_config.json"):
        export_lslora.check_output(tmp_path)


@pytest.mark.parametrize("main", [export_lslora.main, eval_lslora.main])
def test_a_terminal_may_lack_characters(main, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["--adapter", "nowhere", "--dataset", "rows.jsonl", "--output", "plain"]) == 2
    assert sys.stdout.errors == "backslashreplace"


def test_a_tokenizer_that_is_not_there_is_told(tiny, tmp_path, capsys):
    shutil.copytree(tiny / "model", tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    assert run(tiny, tmp_path / "out", "--model_name", tmp_path / "model", "--report_to", "codecarbon") == 2
    told = capsys.readouterr().err
    assert f"- the tokenizer of the base model {tmp_path / 'model'}: " in told and "- codecarbon, for" in told


def test_ctrl_c_ends_an_export_in_a_word(capsys, monkeypatch):
    monkeypatch.setattr(export_lslora, "load_examples", interrupted)
    assert export_lslora.main(["--adapter", "a", "--dataset", "rows.jsonl", "--output", "plain"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_an_export_knows_that_the_embedded_model_has_no_limit():
    export_lslora.check_lengths(BaseModel("smollm2"), [{"text": "one two"}], "rows.jsonl")


def test_recipes_that_cannot_run_stop_at_once():
    wrong = subprocess.run(["bash", ROOT / "train_lslora.sh", "phi4"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "the recipe must be smollm2 or phi3, got 'phi4'" in wrong.stderr
    if not torch.cuda.is_available():
        phi3 = subprocess.run(["bash", ROOT / "train_lslora.sh", "phi3"], capture_output=True, text=True, timeout=20)
        assert phi3.returncode == 2 and "a CUDA device" in phi3.stderr


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_launch_configurations_are_accelerate_s(name):
    """It refuses keys that it does not know."""
    config = load_config_from_file(str(ROOT / "scripts" / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}[name]
    known = {action.dest for action in launch_command_parser()._actions}
    fsdp, deepspeed = config.fsdp_config or {}, config.deepspeed_config or {}
    assert fsdp.keys() | deepspeed.keys() <= known


def launch(processes, tiny, output_dir, *more):
    """The log of `train_lslora.py` in CPU processes, every step on all rows, whose order would differ otherwise."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", processes, "--", ROOT / "train_lslora.py"]
    command += ["--model_name", tiny / "model", "--dataset_path", tiny / "train.jsonl", "--output_dir", output_dir]
    command += ["--logging_steps", 1, "--learning_rate", 1e-3, "--lr_scheduler_type", "constant", "--r", 2]
    command += [
        "--batch_size",
        len(ROWS) // processes,
        "--lora_dropout",
        0,
        "--spline_lr",
        1e-2,
        "--save_steps",
        4,
    ]
    command += ["--calibration_steps", 2, "--max_steps", 4, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(c) for c in command], env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    return [(entry["loss"], entry["spline/deviation"]) for entry in log_of(output_dir)]


def test_two_processes_train_as_one_does_and_one_goes_on(tiny, tmp_path):
    two, one = (launch(count, tiny, tmp_path / str(count)) for count in (2, 1))
    assert two[-1][1] > 1e-3
    assert two == [pytest.approx(entry, rel=1e-4) for entry in one]
    saved, expected = (load_file(tmp_path / count / "adapter_model.safetensors") for count in "21")
    torch.testing.assert_close(saved, expected, rtol=1e-3, atol=1e-5)
    two, one = (launch(1, tiny, tmp_path / count, "--max_steps", 6, "--resume") for count in "21")
    assert len(two) == 6
    assert two == [pytest.approx(entry, rel=1e-4) for entry in one]


def test_what_it_saves_is_exported_as_plain_lora(tiny, tmp_path, capsys):
    assert run(tiny, tmp_path / "trained") == 0
    data = tiny / "train.jsonl"
    arguments = ["--adapter", tmp_path / "trained", "--dataset", data, "--output", tmp_path / "plain"]
    assert export_lslora.main([str(a) for a in (*arguments, "--tolerance", 0)]) == 2
    assert "error: the linear updates must be within 0 of the trained ones" in capsys.readouterr().err
    over = [*arguments[:-1], tmp_path / "trained" / "." / "", "--tolerance", 1]
    assert export_lslora.main([str(a) for a in over]) == 2
    assert "must be a new folder or that of an earlier export" in capsys.readouterr().err
    assert run(tiny, tmp_path / "lora", "--method", "lora") == 0
    assert export_lslora.main([str(a) for a in (*arguments[:-1], tmp_path / "lora", "--tolerance", 1)]) == 2
    assert "must be a new folder or that of an earlier export" in capsys.readouterr().err
    alike = ["--tolerance", 1, "--eval_dataset", written(tmp_path / "eval.jsonl", [ALIKE])]
    assert export_lslora.main([str(a) for a in (*arguments, *alike)]) == 2
    assert "row 1: no option's tokens may begin" in capsys.readouterr().err
    assert not (tmp_path / "plain").exists()
    assert export_lslora.main([str(a) for a in (*arguments, "--tolerance", 1, "--eval_dataset", data)]) == 0
    assert "over 14 layers" in capsys.readouterr().out
    results = json.loads((tmp_path / "plain" / "export.json").read_text())
    assert len(results["errors"]) == 14 and all(0 <= error < 1 for error in results["errors"].values())
    assert results["comparison"]["n"] == len(ROWS)
    assert export_lslora.main([str(a) for a in (*arguments, "--tolerance", 1)]) == 0  # once more
    assert "comparison" not in json.loads((tmp_path / "plain" / "export.json").read_text())
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.peft_config["default"].peft_type == "LORA"
    assert any(parameter.abs().max() > 0 for name, parameter in plain.named_parameters() if "lora_B" in name)


def test_recipes_take_the_paths_of_whoever_calls(tiny, tmp_path):
    assert run(tiny, tmp_path / "adapter") == 0
    environment = tmp_path / "environment"  # nothing to install, nothing to enter
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "activate").touch()
    (environment / ".installed-train").write_bytes((ROOT / "constraints.txt").read_bytes())
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    asking = ["bash", ROOT / "eval_lslora.sh", tmp_path / "adapter", "--dataset", "train.jsonl", "--output", "a.json"]
    training = ["bash", ROOT / "train_lslora.sh", "smollm2", "--model_name", tiny / "model", "--max_steps", "6"]
    training += ["--dataset_path", "train.jsonl", "--eval_dataset_path", "train.jsonl", "--output_dir", "trained"]
    variables = {**os.environ, "PATH": path, "LSLORA_VENV": str(environment)}
    there = tmp_path / "there"
    there.mkdir()
    (there / "train.jsonl").write_bytes((tiny / "train.jsonl").read_bytes())
    for command in (asking, training):
        subprocess.run(command, cwd=there, env=variables, check=True, capture_output=True)
    assert len(json.loads((there / "a.json").read_text())["predictions"]) == len(ROWS)
    assert json.loads((there / "trained" / "run.json").read_text())["accuracy"]["base"]["micro"]["n"] == len(ROWS)
