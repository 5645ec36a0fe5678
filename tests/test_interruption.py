"""Ctrl-C and SIGTERM: the training ends after its step, with a checkpoint, and goes on to the same weights."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import Trainer, TrainingArguments

from lslora import report
from lslora.checkpoints import WholeCheckpointsMixin, last_whole_checkpoint
from lslora.files import sha256
from lslora.interruption import ONE_WISH, SIGNALS, StopOnSignal

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import train_lslora  # noqa: E402


class Net(torch.nn.Module):
    """Learns one number."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)

    def forward(self, x, labels):
        return {"loss": (self.linear(x) - labels).square().mean()}


def arguments(tiny, output, *more):
    given = ["--model_name", tiny / "model", "--dataset_path", tiny / "train.jsonl", "--output_dir", output]
    given += ["--max_steps", 6, "--save_steps", 100, "--learning_rate", 1e-2, "--r", 2, "--calibration_steps", 4]
    return [str(argument) for argument in (*given, *more)]


def signal_after(step, number):
    """Send this process a signal in the given optimizer step, once."""
    steps = iter(range(1, 100))

    def count(*_):
        if next(steps) == step:
            os.kill(os.getpid(), number)

    return register_optimizer_step_post_hook(count)


def stopped_after(step, number, given):
    """Train until the signal comes, and see the training stopped by it."""
    hook = signal_after(step, number)
    try:
        assert train_lslora.main(given) == 128 + number
    finally:
        hook.remove()


@pytest.fixture(autouse=True)
def heard():
    """Both signals as in a terminal: a shell may have this very process ignore Ctrl-C."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("steps", [3, 8])
def test_rows_grouped_by_length_go_on_in_the_order_of_their_epoch(tiny, tmp_path, steps):
    """24 rows in batches of 4: one stop is in the first epoch, one in the second."""
    more = ("--group_by_length", "--max_steps", 10)
    assert train_lslora.main(arguments(tiny, tmp_path / "whole", *more)) == 0
    stopped_after(steps, signal.SIGTERM, arguments(tiny, tmp_path / "cut", *more))
    assert train_lslora.main(arguments(tiny, tmp_path / "cut", *more, "--resume")) == 0
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_stops_and_resume_ends_with_the_same_weights(tiny, tmp_path, capsys, number):
    assert train_lslora.main(arguments(tiny, tmp_path / "whole")) == 0
    stopped_after(3, number, arguments(tiny, tmp_path / "cut"))
    assert f"stopped by {number.name} after step 3, with a checkpoint in" in capsys.readouterr().err
    assert last_whole_checkpoint(tmp_path / "cut") == (tmp_path / "cut" / "checkpoint-3", [])
    assert not (tmp_path / "cut" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "cut" / "README.md").exists()  # a card without its adapter
    assert train_lslora.main(arguments(tiny, tmp_path / "cut", "--resume")) == 0
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)


def test_a_quantised_run_goes_on_to_the_same_weights(tiny, tmp_path):
    """TRL trains A and B in bf16 on such a base, and peft would load them as fp32."""
    pytest.importorskip("bitsandbytes")
    assert train_lslora.main(arguments(tiny, tmp_path / "whole", "--load_in_4bit")) == 0
    stopped_after(3, signal.SIGTERM, arguments(tiny, tmp_path / "cut", "--load_in_4bit"))
    assert train_lslora.main(arguments(tiny, tmp_path / "cut", "--load_in_4bit", "--resume")) == 0
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert torch.bfloat16 in {tensor.dtype for tensor in whole.values()}
    assert whole.keys() == cut.keys()
    assert all(whole[key].dtype == cut[key].dtype and torch.equal(whole[key], cut[key]) for key in whole)


def test_a_run_that_goes_on_saves_and_logs_as_often_as_it_is_told_now(tiny, tmp_path):
    stopped_after(2, signal.SIGTERM, arguments(tiny, tmp_path, "--logging_steps", 1))
    assert train_lslora.main(arguments(tiny, tmp_path, "--resume", "--save_steps", 2, "--logging_steps", 3)) == 0
    assert {int(folder.name.rpartition("-")[2]) for folder in tmp_path.glob("checkpoint-*")} == {2, 4, 6}
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 6]


def test_a_finished_run_that_went_on_and_was_stopped_is_not_begun_anew_without_a_word(tiny, tmp_path, capsys):
    given = arguments(tiny, tmp_path)
    assert train_lslora.main(given) == 0
    longer = [*given, "--max_steps", "1000"]
    stopped_after(30, signal.SIGTERM, [*longer, "--resume"])
    stopped = last_whole_checkpoint(tmp_path)
    capsys.readouterr()
    assert train_lslora.main(given) == 2
    assert f"go on from {stopped[0]} with --resume" in capsys.readouterr().err
    assert last_whole_checkpoint(tmp_path) == stopped


def test_a_later_signal_acts_as_ever():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(KeyboardInterrupt), StopOnSignal() as stop:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):  # as a terminal and a launcher send them
            os.kill(os.getpid(), number)
        assert stop.signal == signal.SIGINT
        time.sleep(ONE_WISH + 0.1)
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_that_is_ignored_stays_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopOnSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal is None


def test_processes_stop_together(tiny, tmp_path):
    """SIGTERM to one of two; the other would wait for it forever."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
    command += ["train_lslora.py", *arguments(tiny, tmp_path / "out", "--max_steps", 10000, "--logging_steps", 1)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as agent:
        while not (tmp_path / "out" / "spline_course.jsonl").exists() and agent.poll() is None:
            time.sleep(0.2)
        time.sleep(1)
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
        _, told = agent.communicate(timeout=120)
    assert "stopped by SIGTERM after step" in told
    whole, problems = last_whole_checkpoint(tmp_path / "out")
    assert whole is not None and not problems


def test_resume_passes_over_a_checkpoint_that_is_not_whole(tiny, tmp_path, capsys):
    more = ["--save_steps", 2]
    assert train_lslora.main(arguments(tiny, tmp_path / "whole", *more)) == 0
    assert train_lslora.main(arguments(tiny, tmp_path / "cut", *more)) == 0
    for name in ("checkpoint-6/optimizer.pt", "adapter_model.safetensors"):
        path = tmp_path / "cut" / name
        path.write_bytes(path.read_bytes()[:-10])
    assert train_lslora.main(arguments(tiny, tmp_path / "cut", *more, "--resume")) == 0
    told = capsys.readouterr()
    assert "checkpoint-6: optimizer.pt missing or changed" in told.err
    assert f"Going on from {tmp_path / 'cut' / 'checkpoint-4'}" in told.out
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_resume_wants_the_settings_of_its_run(tiny, tmp_path, capsys):
    assert train_lslora.main(arguments(tiny, tmp_path, "--max_steps", 2)) == 0
    assert train_lslora.main(arguments(tiny, tmp_path, "--resume", "--learning_rate", 1e-3, "--r", 4)) == 2
    told = capsys.readouterr().err
    assert "learning_rate was 0.01 and is 0.001" in told and "r was 2 and is 4" in told and "max_steps" not in told


def test_resume_wants_the_rows_of_its_run_and_as_many_a_step(tiny, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes((tiny / "train.jsonl").read_bytes())
    mine = ("--dataset_path", rows, "--batch_size", 4)
    assert train_lslora.main(arguments(tiny, tmp_path / "out", *mine, "--max_steps", 2)) == 0
    spread = (*mine, "--batch_size", 2, "--gradient_accumulation_steps", 2, "--max_steps", 3)
    assert train_lslora.main(arguments(tiny, tmp_path / "out", *spread, "--resume")) == 0
    fewer = (*mine, "--batch_size", 2)
    assert train_lslora.main(arguments(tiny, tmp_path / "out", *fewer, "--resume")) == 2
    assert "rows_a_step was 4 and is 2" in capsys.readouterr().err
    rows.write_bytes(b"\n".join(rows.read_bytes().splitlines()[::-1]))
    assert train_lslora.main(arguments(tiny, tmp_path / "out", *mine, "--resume")) == 2
    assert f"dataset_sha256 was '{sha256(tiny / 'train.jsonl')}' and is '{sha256(rows)}'" in capsys.readouterr().err


def test_a_new_run_never_resumes_an_older_one_s_checkpoints(tiny, tmp_path, capsys):
    assert train_lslora.main(arguments(tiny, tmp_path, "--save_steps", 2)) == 0
    stopped_after(3, signal.SIGTERM, arguments(tiny, tmp_path, "--seed", 1))
    whole, problems = last_whole_checkpoint(tmp_path)
    assert whole == tmp_path / "checkpoint-3"
    assert [p.split(":")[0] for p in problems] == [str(tmp_path / f"checkpoint-{step}") for step in (6, 4)]
    assert all("a new run has begun in its folder since" in problem for problem in problems)


def test_the_adapter_of_an_older_run_and_its_card_stay_until_there_is_another(tiny, tmp_path):
    assert train_lslora.main(arguments(tiny, tmp_path)) == 0
    names = ("README.md", "adapter_config.json", "adapter_model.safetensors", "report.html")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    other = arguments(tiny, tmp_path, "--method", "lora", "--save_steps", 2)
    stopped_after(3, signal.SIGTERM, other)
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    assert train_lslora.main([*other, "--resume"]) == 0
    assert not any((tmp_path / name).read_bytes() == content for name, content in before.items())


def test_a_signal_s_checkpoint_stays_where_the_best_one_is_all_that_is_kept(tmp_path):
    class WholeTrainer(WholeCheckpointsMixin, Trainer):
        pass

    rows = [{"x": torch.ones(4), "labels": torch.ones(1)} for _ in range(8)]
    settings = TrainingArguments(
        str(tmp_path), max_steps=8, save_steps=3, eval_steps=3, eval_strategy="steps", load_best_model_at_end=True,
        save_total_limit=1, use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=0.1,
    )  # fmt: skip
    with StopOnSignal() as stop:
        trainer = WholeTrainer(Net(), settings, train_dataset=rows, eval_dataset=rows, callbacks=[stop])
        hook = signal_after(4, signal.SIGTERM)
        try:
            trainer.train()
        finally:
            hook.remove()
    assert stop.signal == signal.SIGTERM
    assert last_whole_checkpoint(tmp_path) == (tmp_path / "checkpoint-4", [])
    assert (tmp_path / "checkpoint-3").exists()


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_with_all_its_steps_behind_it_trains_no_more(tiny, tmp_path, capsys):
    """As after a kill between the last checkpoint and the adapter."""
    more = ["--save_steps", 3, "--lr_scheduler_type", "constant"]
    assert train_lslora.main(arguments(tiny, tmp_path, *more)) == 0
    before = weights(tmp_path)
    for path in tmp_path.iterdir():
        if path.is_file() and path.name != "run.json":
            path.unlink()
    assert train_lslora.main(arguments(tiny, tmp_path, *more, "--resume")) == 0
    after = weights(tmp_path)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert not (tmp_path / "checkpoint-7").exists() and (tmp_path / "report.html").exists()
    assert train_lslora.main(arguments(tiny, tmp_path, *more, "--resume", "--max_steps", 5)) == 2
    assert "--max_steps of at least 6" in capsys.readouterr().err


def test_a_run_that_was_stopped_is_not_lost_to_a_forgotten_resume(tiny, tmp_path, capsys):
    stopped_after(3, signal.SIGTERM, arguments(tiny, tmp_path))
    assert train_lslora.main(arguments(tiny, tmp_path, "--seed", 1)) == 2
    assert "go on from" in capsys.readouterr().err
    assert train_lslora.main(arguments(tiny, tmp_path, "--resume")) == 0


def test_a_new_run_that_dies_early_is_not_reported_as_the_one_before(tiny, tmp_path):
    assert train_lslora.main(arguments(tiny, tmp_path, "--save_steps", 100)) == 0
    stopped_after(1, signal.SIGTERM, arguments(tiny, tmp_path, "--seed", 1))
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert report._load_state(tmp_path)["log_history"] == state["log_history"]


def test_recommended_defaults_stay_when_a_run_is_prolonged(tiny, tmp_path):
    given = arguments(tiny, tmp_path, "--recommended")
    at = given.index("--calibration_steps")
    del given[at : at + 2]
    assert train_lslora.main(given) == 0
    assert train_lslora.main([*given, "--resume", "--max_steps", "9"]) == 0
    assert json.loads((tmp_path / "adapter_config.json").read_text())["calibration_steps"] == 2
