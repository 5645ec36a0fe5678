"""Files and checkpoints that are there whole or not at all; tests/torture tries the same on real runs."""

import json
import os
import subprocess

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import Trainer, TrainingArguments

from lslora.checkpoints import (
    SEAL,
    CheckpointError,
    WholeCheckpointsMixin,
    is_of_writing,
    last_whole_checkpoint,
    problem_of,
    remove_older,
    seal,
    unseal,
)
from lslora.files import publish, replacing, write_json_whole, write_whole
from tests.torture import disk, kill


def test_a_file_is_replaced_at_the_end_and_only_if_all_went_well(tmp_path):
    path = tmp_path / "new" / "page.html"
    write_whole(path, "é1")
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text("2", encoding="utf-8")
        assert part.suffix == ".html" and path.read_text(encoding="utf-8") == "é1"
        raise KeyboardInterrupt
    assert path.read_text(encoding="utf-8") == "é1"
    with replacing(path) as part:
        part.write_text("3", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "3"
    assert [entry.name for entry in path.parent.iterdir()] == ["page.html"]


def test_a_folder_is_published_over_what_is_there(tmp_path):
    stage, folder = tmp_path / "out" / ".part", tmp_path / "out"
    (stage / "deep").mkdir(parents=True)
    for name in ("a", "deep/b"):
        (stage / name).write_text("new")
    (folder / "a").write_text("old")
    (folder / "c").write_text("old")
    publish(stage, folder)
    assert {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()} == {
        "a": "new", "deep/b": "new", "c": "old",
    }  # fmt: skip
    assert not stage.exists()


def checkpoint(folder, step):
    made = folder / f"checkpoint-{step}"
    (made / "deep").mkdir(parents=True)
    for name in ("adapter_model.safetensors", "trainer_state.json", "deep/rng"):
        (made / name).write_bytes(os.urandom(99))
    seal(made)
    return made


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    return "adapter_model.safetensors missing or changed"


def flip(folder):
    path = folder / "deep" / "rng"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    return "deep/rng missing or changed"


def lose(folder):
    (folder / "trainer_state.json").unlink()
    return "trainer_state.json missing or changed"


def no_seal(folder):
    (folder / SEAL).unlink()
    return "it has no whole.json: it was not written to its end, or a new run has begun in its folder since"


def half_seal(folder):
    (folder / SEAL).write_text((folder / SEAL).read_text()[:30])
    return "its whole.json is not readable"


@pytest.mark.parametrize("damage", [cut, flip, lose, no_seal, half_seal])
def test_the_last_whole_checkpoint_is_found_and_others_are_told(tmp_path, damage):
    assert last_whole_checkpoint(tmp_path) == (None, [])
    whole = {step: checkpoint(tmp_path, step) for step in (90, 100, 110)}
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path) == (whole[110], [])
    problem = damage(whole[110])
    assert problem_of(whole[110]) == problem
    assert last_whole_checkpoint(tmp_path) == (whole[100], [f"{whole[110]}: {problem}"])
    assert unseal(tmp_path) == 3 - (damage is no_seal)
    assert last_whole_checkpoint(tmp_path)[0] is None
    assert (whole[90] / "adapter_model.safetensors").exists()


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x, y):
        return {"loss": (self.layer(x) - y).square().mean()}


class WholeTrainer(WholeCheckpointsMixin, Trainer):
    """Any trainer, of anything."""


def trainer_in(folder, **more):
    arguments = TrainingArguments(
        str(folder), **{"max_steps": 4} | more, save_steps=2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    rows = [{"x": torch.ones(3), "y": torch.ones(1)}] * 8
    return WholeTrainer(model=Regression(), args=arguments, train_dataset=rows)


def test_any_trainer_seals_what_it_saves(tmp_path):
    trainer_in(tmp_path).train()
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        assert problem_of(folder) is None
        sealed = json.loads((folder / SEAL).read_text())["sha256"]
        assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= sealed.keys()


def test_what_cannot_be_written_is_told_and_removed(tmp_path):
    trainer_in(tmp_path).train()
    for part in (tmp_path / "checkpoint-4").iterdir():
        part.unlink()
    (tmp_path / "checkpoint-4" / "optimizer.pt").mkdir()  # where a file should go
    with pytest.raises(CheckpointError, match=r"checkpoint-4 could not be written, with \d+ bytes free"):
        trainer_in(tmp_path).train()
    assert not (tmp_path / "checkpoint-4").exists()
    assert last_whole_checkpoint(tmp_path) == (tmp_path / "checkpoint-2", [])


@pytest.mark.parametrize("limit", [1, 2])
def test_a_checkpoint_over_the_limit_goes_when_the_new_one_is_sealed(tmp_path, monkeypatch, limit):
    """With a kill before that there is always one to go on from."""
    there = []

    def look_and_seal(folder):
        there.append(last_whole_checkpoint(tmp_path)[0])
        seal(folder)

    monkeypatch.setattr("lslora.checkpoints.seal", look_and_seal)
    trainer = trainer_in(tmp_path, save_total_limit=limit, max_steps=8)
    trainer.train()
    assert [folder and folder.name for folder in there] == [None, "checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"][-limit:]
    assert trainer.args.save_total_limit == limit


@pytest.mark.parametrize("sealed_before", [True, False])
@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, {10, 20, 30, 90}),
        (1, None, {30}),
        (2, None, {20, 30}),
        (3, None, {10, 20, 30}),
        (1, 10, {10, 30}),
        (2, 10, {10, 30}),
        (3, 10, {10, 20, 30}),
        (2, 30, {20, 30}),
        (9, 10, {10, 20, 30, 90}),
    ],
)
def test_what_is_kept_is_the_last_the_best_and_of_this_run(tmp_path, limit, best, kept, sealed_before):
    folders = {step: tmp_path / f"checkpoint-{step}" for step in (90, 10, 20, 30)}
    for time, (step, folder) in enumerate(folders.items()):
        folder.mkdir()
        if step != 90 or sealed_before:  # of an earlier run
            seal(folder)
            os.utime(folder / SEAL, (time, time))
    remove_older(folders[30], limit, best=best and str(folders[best]))
    assert {int(folder.name.partition("-")[2]) for folder in tmp_path.iterdir()} == kept


def test_what_has_just_been_saved_is_kept_whatever_else_is_there(tmp_path):
    trainer_in(tmp_path, max_steps=8).train()
    trainer_in(tmp_path, max_steps=4, save_total_limit=1).train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    stored = torch.load(tmp_path / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert (stored.max_steps, stored.save_total_limit) == (4, 1)


def test_killed_runs_end_with_the_weights_of_one_that_was_not(capsys):
    assert kill.main(["--runs", "3", "--seed", "1"]) == 0
    assert "3 of 3 runs with" in capsys.readouterr().out


def can_mount(folder):
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
    return done.returncode == 0 and subprocess.run(["umount", folder]).returncode == 0


def test_an_error_of_a_library_s_own_kind_is_a_checkpoint_s_and_others_are_not():
    """tokenizers raises a bare Exception where it cannot write."""
    with pytest.raises(Exception, match="No such file") as bare:
        Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save("/no/such/folder/tokenizer.json")
    assert is_of_writing(bare.value)
    assert is_of_writing(OSError()) and not is_of_writing(ValueError()) and not is_of_writing(KeyError())


def test_a_full_disk_is_told_and_costs_nothing_that_was_whole(tmp_path, capsys):
    if not can_mount(tmp_path):
        pytest.skip("needs the right to mount a file system")
    assert disk.main(["--tries", "3"]) == 0
    assert "3 of 3 full disks" in capsys.readouterr().out


def test_json_with_iterators_is_the_json_of_their_lists(tmp_path):
    value = {"a": {"é": [1, {"b": None}], "none": {}}, "c": [{"d": '"\u2028'}, 2], "e": []}
    lazy = {"a": value["a"], "c": iter(value["c"]), "e": iter([])}
    write_json_whole(tmp_path / "x.json", lazy)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert '\n{"d": ' in text  # an element a line


def test_an_iterator_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("before", encoding="utf-8")
    with pytest.raises(ZeroDivisionError):
        write_json_whole(path, {"a": (1 // number for number in (1, 0))})
    assert path.read_text(encoding="utf-8") == "before"
    assert list(tmp_path.iterdir()) == [path]
