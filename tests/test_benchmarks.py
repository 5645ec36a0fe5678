"""The measuring itself: cut models against whole ones, plans that go on after a kill, statistics in closed form."""

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from benchmarks import overlap, quality, report
from benchmarks.runs import Bench, CompletionTrainer, Run, Setting, spline_lr
from benchmarks.tasks import (
    IGNORED,
    Prefix,
    collate,
    completion_logits,
    encode,
    evaluate,
    likelihoods,
    load_examples,
    written_out,
)
from lslora import Spline
from lslora.spline import splines_of


def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).eval()


def examples(lengths=(5, 9, 7), prompt=3):
    generator = torch.Generator().manual_seed(1)
    found = []
    for length in lengths:
        ids = torch.randint(0, 50, (length + 1,), generator=generator)
        targets = ids[1:].clone()
        targets[: prompt - 1] = IGNORED
        found.append({"input_ids": ids[:-1], "targets": targets, "wrong": []})
    return found


def adapted(model, first_layer):
    torch.manual_seed(2)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=2, target_modules=targets, layers_to_transform=list(range(first_layer, 4)))
    peft_model = get_peft_model(model, config)
    torch.manual_seed(3)
    for name, parameter in sorted(peft_model.named_parameters()):
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return peft_model


def test_a_cut_model_learns_what_the_whole_one_does(tmp_path, monkeypatch):
    monkeypatch.setenv("LSLORA_CACHE", str(tmp_path))
    whole_rows, cut_rows = examples(), examples()
    whole = adapted(tiny_llama(), 2)
    base = tiny_llama()
    Prefix(base, 2, "tiny").attach_states(cut_rows)
    cut = adapted(base, 2)
    gradients = []
    for model, rows in ((whole, whole_rows), (cut, cut_rows)):
        cross_entropy(*completion_logits(model, collate(rows))).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_states_are_computed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LSLORA_CACHE", str(tmp_path))
    first, second = examples(), examples()
    Prefix(tiny_llama(), 2, "tiny").attach_states(first)
    prefix = Prefix(tiny_llama(), 2, "tiny")
    monkeypatch.setattr(prefix, "_compute", lambda rows: pytest.fail("computed again"))
    prefix.attach_states(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a["states"], b["states"])


def test_likelihood_is_that_of_single_rows():
    model, rows = tiny_llama(), examples()
    found = evaluate(model, rows)
    for row, nll, tokens in zip(rows, found["row_nll"], found["row_tokens"], strict=True):
        logits = model(row["input_ids"][None]).logits[0]
        assert nll == pytest.approx(cross_entropy(logits, row["targets"], reduction="sum").item(), rel=1e-5)
        assert tokens == (row["targets"] != IGNORED).sum()
    assert found["nll"] == pytest.approx(sum(found["row_nll"]) / sum(found["row_tokens"]))


class Words:
    """A tokenizer whose tokens are words."""

    eos_token_id = 0

    def __init__(self):
        self.ids = {}

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [self.ids.setdefault(word, len(self.ids) + 1) for word in text.split()]}


QUESTION = {
    "instruction": "Is water wet?\n\nAnswer format: true/false",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}


def test_only_the_completion_is_predicted_and_ends():
    tokenizer = Words()
    row = encode(QUESTION, tokenizer)
    words = {number: word for word, number in tokenizer.ids.items()}
    predicted = [words.get(t, "END") for t in row["targets"].tolist() if t != IGNORED]
    assert predicted == ["the", "correct", "answer", "is", "true", "END"]
    (wrong,) = row["wrong"]
    assert [words[t] for t in wrong["input_ids"].tolist()[-5:]] == ["the", "correct", "answer", "is", "false"]


def test_numbered_answers_are_written_out():
    row = {
        "instruction": "Please choose: Why: because?\n\nAnswer1: yes and no Answer2: no Answer3: a: b\n\n"
        "Answer format: answer1/answer2/answer3",
        "input": "",
        "output": "the correct answer is answer2",
        "answer": "answer2",
    }
    right, wrong = written_out(row)
    assert right == row | {"instruction": "Why: because?", "output": "no"}
    assert [other["output"] for other in wrong] == ["yes and no", "a: b"]
    assert len(encode(row, Words(), cloze=True)["wrong"]) == 2
    with pytest.raises(ValueError, match="one of its numbered answers, got 'Is water wet"):
        written_out(QUESTION)
    with pytest.raises(ValueError, match="one of its numbered answers"):
        written_out(row | {"answer": "answer4"})


def test_accuracy_is_of_the_likeliest_completion():
    model = tiny_llama()
    first, second, third = examples()
    nll = [loss for loss, _ in likelihoods(model, [first, second, third])]
    best, *others = sorted(range(3), key=nll.__getitem__)
    rows = [first, second, third]
    asked = [
        rows[best] | {"wrong": [rows[i] for i in others]},
        rows[others[0]] | {"wrong": [rows[others[1]], rows[best]]},
        rows[others[0]] | {"wrong": [rows[others[1]]]},
    ]
    found = evaluate(model, asked)
    assert found["row_correct"] == [True, False, True]
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["row_nll"] == [pytest.approx(nll[i]) for i in (best, others[0], others[0])]


PLAN = """
[setting]
model = "m"
train = "t"
validation = "v"
[methods]
lora = { kind = "lora" }
out = { kind = "lslora", num_knots = 7 }
[[runs]]
methods = ["lora", "out"]
r = [4]
lr = [1e-3, 2e-3]
seeds = [0, 1]
[[runs]]
methods = ["lora"]
r = [4]
lr = [2e-3, 4e-3]
seeds = [0]
"""


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return path


def test_a_plan_is_the_product_of_its_lists_without_repeats(plan):
    setting, runs = quality.read_plan(plan)
    assert setting.model == "m"
    assert len(runs) == len({run.id for run in runs}) == 9
    assert runs[-1] == Run("lora", {"kind": "lora"}, 4, 4e-3, 0)


def test_a_plan_with_an_undefined_method_names_it(plan):
    plan.write_text(PLAN.replace('methods = ["lora"]', 'methods = ["loda"]'))
    with pytest.raises(ValueError, match="'loda', defined are \\['lora', 'out'\\]"):
        quality.read_plan(plan)


class CountingBench:
    """Takes the place of training: the record says which run it is."""

    def __init__(self, stop_after):
        self.left, self.done = stop_after, []

    def measure(self, run):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.done.append(run.id)
        return {"run": {**vars(run)}, "setting": {"model": "m", "train": "t", "validation": "v"}, "train_seconds": 0.0}


def test_a_killed_plan_goes_on_where_it_was(plan, tmp_path, monkeypatch):
    setting, runs = quality.read_plan(plan)
    first, second = CountingBench(4), CountingBench(100)
    monkeypatch.setattr(quality, "Bench", lambda *args: first)
    with pytest.raises(KeyboardInterrupt):
        quality.do_runs(setting, runs, tmp_path, tmp_path / "out")
    monkeypatch.setattr(quality, "Bench", lambda *args: second)
    quality.do_runs(setting, runs, tmp_path, tmp_path / "out")
    assert first.done + second.done == [run.id for run in runs]
    assert [r["run"]["lr"] for r in quality.load_records(runs, tmp_path / "out")] == [run.lr for run in runs]


def test_runs_at_work_elsewhere_are_left_alone(plan, tmp_path, monkeypatch):
    setting, runs = quality.read_plan(plan)
    bench = CountingBench(100)
    monkeypatch.setattr(quality, "Bench", lambda *args: bench)
    folder = tmp_path / "out"
    folder.mkdir()
    with quality.claimed(folder / f"{runs[1].id}.lock") as mine:
        assert mine
        quality.do_runs(setting, runs, tmp_path, folder)
    assert bench.done == [run.id for run in runs if run != runs[1]]


def test_a_result_of_other_options_is_not_taken_for_this_one(plan, tmp_path, monkeypatch):
    setting, runs = quality.read_plan(plan)
    monkeypatch.setattr(quality, "Bench", lambda *args: CountingBench(100))
    quality.do_runs(setting, runs, tmp_path, tmp_path / "out")
    plan.write_text(PLAN.replace("num_knots = 7", "num_knots = 9"))
    setting, runs = quality.read_plan(plan)
    with pytest.raises(ValueError, match="'num_knots': 7.*'num_knots': 9"):
        quality.do_runs(setting, runs, tmp_path, tmp_path / "out")


def test_a_result_of_another_setting_is_not_taken_for_this_one(plan, tmp_path, monkeypatch):
    setting, runs = quality.read_plan(plan)
    monkeypatch.setattr(quality, "Bench", lambda *args: CountingBench(100))
    quality.do_runs(setting, runs, tmp_path, tmp_path / "out")
    plan.write_text(PLAN.replace('validation = "v"', 'validation = "v"\nsteps = 61'))
    setting, runs = quality.read_plan(plan)
    with pytest.raises(ValueError, match="'steps': 61.*rename the plan"):
        quality.do_runs(setting, runs, tmp_path, tmp_path / "out")


def record(name, lr, seed, nll, r=4):
    """A run whose even rows have this nll and whose odd rows have 1 more."""
    return {
        "run": {"name": name, "r": r, "lr": lr, "seed": seed},
        "diverged": math.isnan(nll),
        "losses": [2.0, 1.0],
        "trainable_parameters": 10,
        "validation": {"nll": nll, "row_nll": [nll, nll + 1] * 3, "row_tokens": [1] * 6},
    }


def test_the_rate_is_chosen_on_even_rows_and_reported_on_odd_ones():
    records = [record("lora", lr, 0, nll) for lr, nll in ((1e-3, 0.5), (2e-3, 0.3), (4e-3, math.nan))]
    (cell,) = report.group(records).values()
    assert report.best_rate(cell) == 2e-3
    assert report.is_bracketed(cell, 2e-3) and not report.is_bracketed(cell, 4e-3)
    assert report.mean_score(cell[2e-3], "nll", report.ODD) == pytest.approx(1.3)


def test_the_rate_is_chosen_among_those_with_the_most_seeds():
    nlls = {1e-3: [0.2], 2e-3: [0.3, 0.9], 4e-3: [0.5, 0.6]}
    records = [record("lora", lr, seed, nll) for lr, seeds in nlls.items() for seed, nll in enumerate(seeds)]
    (cell,) = report.group(records).values()
    assert report.best_rate(cell) == 4e-3


def test_learning_rates_are_compared_over_the_seeds_they_share():
    records = [record("lora", 1e-3, 0, 0.2), record("lora", 2e-3, 0, 0.3), record("lora", 2e-3, 1, 0.9)]
    (cell,) = report.group(records).values()
    found = report.common_seeds(cell)
    assert {rate: list(seeds) for rate, seeds in found.items()} == {1e-3: [0], 2e-3: [0]}
    assert report.mean_score(found[2e-3], "nll", report.EVEN) == pytest.approx(0.3)


def test_learning_rates_are_drawn_on_one_seed(tmp_path, monkeypatch):
    records = [record("lora", lr, 1, nll) for lr, nll in ((1e-3, 0.2), (2e-3, 0.3))]
    records += [record("o", 1e-3, 0, 0.1), record("o", 1e-3, 1, 0.25), record("o", 4e-3, 0, 0.1)]
    drawn = {}

    def draw(axis, rates, nlls, label, **_):
        drawn[label] = dict(zip(rates, nlls, strict=True))

    monkeypatch.setattr(report.Axes, "plot", draw)
    monkeypatch.setattr(report, "name_lines", lambda axis: None)
    report.plot_rates(report.group(records), tmp_path / "rates.png")
    assert drawn == {"lora": pytest.approx({1e-3: 0.2, 2e-3: 0.3}), "o": pytest.approx({1e-3: 0.25})}


@pytest.mark.parametrize("nlls", [{1e-3: 0.5, 2e-3: 0.6, 4e-3: math.nan}, {1e-3: math.nan}, {0.0: 0.5}])
def test_rates_are_drawn_where_some_diverged_and_where_nothing_was_trained(nlls, tmp_path):
    cells = report.group([record("lora", lr, 0, nll) for lr, nll in nlls.items()])
    report.plot_rates(cells, tmp_path / "rates.png")
    assert imread(tmp_path / "rates.png").std() > 0


def test_paired_difference_in_closed_form():
    base, other = [0.50, 0.61, 0.42], [0.48, 0.60, 0.39]
    cells = report.group(
        [record("lora", 1e-3, s, x) for s, x in enumerate(base)]
        + [record("o", 2e-3, s, x) for s, x in enumerate(other)]
    )
    found = report.difference(cells[4, "o"], cells[4, "lora"], "nll")
    differences = [b - a for a, b in zip(base, other, strict=True)]
    mean = sum(differences) / 3
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 2 / 3)
    assert found.mean == pytest.approx(mean)
    # Student's t with 2 degrees of freedom: distribution function 1/2 + t / (2 √(2 + t²)), 97.5 % quantile 4.302653.
    assert found.low == pytest.approx(mean - 4.302653 * error, rel=1e-5)
    assert found.high == pytest.approx(mean + 4.302653 * error, rel=1e-5)
    t = abs(mean / error)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t**2))


def test_the_interval_of_other_seeds_and_rows_in_closed_form():
    """Of a difference that is one number for the seed and one for the row; then of rows of other lengths."""
    by_seed, by_row = [0.1, 0.3, 0.2], np.linspace(-1, 2, 401)
    tokens = np.full(401, 2)
    for weights in (tokens, tokens + np.arange(401) % 5):
        records = [record(name, 1e-3, seed, 0.5) for name in ("lora", "o") for seed in range(3)]
        for found in records:
            nll = by_seed[found["run"]["seed"]] + by_row if found["run"]["name"] == "o" else np.zeros(401)
            found["validation"] |= {"row_nll": list(nll * weights), "row_tokens": list(weights)}
        cells = report.group(records)
        found = report.difference(cells[4, "o"], cells[4, "lora"], "nll", report.ALL)
        assert found.mean == pytest.approx(0.2 + np.average(by_row, weights=weights))
        low, high = found.of_all
        assert (low + high) / 2 == pytest.approx(found.mean)
        # Student's t with 2 and with 400 degrees of freedom; a weighted mean's error by its residuals
        of_rows = math.sqrt(np.sum((weights * (by_row - np.average(by_row, weights=weights))) ** 2) * 401 / 400)
        halves = 4.302653 * 0.1 / math.sqrt(3), 1.965912 * of_rows / weights.sum()
        assert (high - low) / 2 == pytest.approx(math.hypot(*halves), rel=1e-5)


def test_rows_that_repeat_a_question_are_found_and_left_out(tiny, tmp_path, capsys):
    assert overlap.plain("Is Tom's 3rd ROSE  red?\n") == "is tom s 3 rd rose red"
    train, measured = ["a 3 b", "c d"], ["c d", "a 4 b", "a 33 b", "a b"]
    assert overlap.repeated(train, measured) == {0}
    assert overlap.repeated(*map(overlap.without_numbers, (train, measured))) == {0, 1, 2}

    rows = [json.loads(line) for line in (tiny / "train.jsonl").read_text().splitlines()][:3]
    new = rows[0] | {"instruction": rows[0]["instruction"].replace("rose", "question")}
    (tmp_path / "data").symlink_to(tiny)
    (tmp_path / "measured.jsonl").write_text("\n".join(map(json.dumps, [new, *rows[:2]])))
    setting = '[setting]\nmodel = "data/model"\ntrain = "data/train.jsonl"\nvalidation = "measured.jsonl"\n'
    method = '[methods.lora]\nkind = "lora"\n[methods.o]\nkind = "lora"\n'
    runs = '[[runs]]\nmethods = ["lora", "o"]\nr = [4]\nlr = [1e-3]\nseeds = [0, 1]\n'
    plan = tmp_path / "plan.toml"
    plan.write_text(setting + method + runs)
    (tmp_path / "out" / "plan").mkdir(parents=True)
    for name, lr, seed in ((name, 1e-3, seed) for name in ("lora", "o") for seed in (0, 1)):
        found = record(name, lr, seed, 0.5)
        nll = [0.7, 0.1, 0.9] if name == "o" else [0.5, 0.5, 0.5]
        found["validation"] |= {"row_nll": nll, "row_tokens": [2, 1, 1]}
        (tmp_path / "out" / "plan" / f"{Run(name, {}, 4, lr, seed).id}.json").write_text(json.dumps(found))
    assert overlap.main(["--plan", str(plan), "--data", str(tmp_path), "--results", str(tmp_path / "out")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "of 3 measured rows 2 ask what one of 24 training rows asks, 2 but for the numbers" in shown
    assert "0.3500 │ +0.1000 │" in shown  # of the first row alone


def test_a_report_is_printed_and_drawn(tmp_path, capsys):
    records = [record(n, lr, s, 0.4 + 0.01 * s) for n in ("lora", "o") for lr in (1e-3, 2e-3) for s in (0, 1)]
    report.report(records)
    report.draw(records, tmp_path)
    shown = capsys.readouterr().out
    assert "nll on the odd rows" in shown and "1.4050" in shown
    for name in ("learning_rates", "differences", "learning_curves"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "retained.png").exists()


def test_what_is_retained_is_reported_beside_what_is_learned(tmp_path, capsys):
    records = [record(n, lr, s, 0.4 + 0.01 * s) for n in ("lora", "o") for lr in (1e-3, 2e-3) for s in (0, 1)]
    for i, found in enumerate(records):
        found["retained"] = {"nll": 2.0, "row_nll": [9.0, 2.0 + i / 100], "row_tokens": [1, 1]}
    records.append(record("lora", 4e-3, 0, math.nan))  # diverged, and has neither
    assert report.metrics_of(records) == ["nll", "retained nll"]
    assert report.score(records[3], "retained nll", report.ODD) == pytest.approx(2.03)
    assert report.score(records[-1], "retained nll", report.ODD) == math.inf
    report.report(records)
    report.draw(records, tmp_path)
    assert (tmp_path / "retained.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "retained nll on the odd rows" in shown and "+0.0400" in shown  # runs 4 and 5 against 0 and 1


@pytest.mark.parametrize(
    ("rows", "mean", "difference"),
    [("odd", "1.4050", "-0.2000"), ("even", "0.4050", "-0.1000"), ("all", "0.9050", "-0.1500")],
)
def test_a_report_tells_of_the_rows_asked_for(rows, mean, difference, capsys):
    records = [record("lora", 1e-3, s, 0.4 + 0.01 * s) for s in (0, 1)]
    for s in (0, 1):
        found = record("o", 1e-3, s, 0.3 + 0.01 * s)
        found["validation"]["row_nll"] = [0.3 + 0.01 * s, 1.2 + 0.01 * s] * 3
        records.append(found)
    report.report(records, rows=rows)
    shown = capsys.readouterr().out
    assert f"nll on the {rows} rows, each" in shown and mean in shown and difference in shown
    assert "nll on the even rows, seeds" in shown  # what chose the rates, whatever is told


def test_any_method_can_be_the_baseline(capsys):
    records = [record(n, 1e-3, s, x + 0.01 * s) for n, x in (("lora", 0.4), ("o", 0.3), ("p", 0.6)) for s in (0, 1)]
    report.report(records, baseline="p")
    shown = capsys.readouterr().out
    assert "minus p" in shown and "-0.2000" in shown and "-0.3000" in shown and "-0.1000" not in shown
    with pytest.raises(ValueError, match=r"one of \['lora', 'o', 'p'\], got 'q'"):
        report.report(records, baseline="q")


def test_a_report_of_a_part_leaves_the_pictures_alone(plan, tmp_path, capsys):
    def nll(run):
        return 0.4 + 0.01 * run.seed + 0.1 * run.r

    plan.write_text(f'{PLAN}[[runs]]\nmethods = ["lora"]\nr = [16]\nlr = [4e-3]\nseeds = [0]')
    _, runs = quality.read_plan(plan)
    folder = tmp_path / plan.stem
    folder.mkdir()
    for run in runs:
        found = record(run.name, run.lr, run.seed, nll(run))
        found["run"]["r"] = run.r
        (folder / f"{run.id}.json").write_text(json.dumps(found))
    arguments = ["report", "--plan", str(plan), "--results", str(tmp_path)]
    last = runs[-1]
    part = ["--seeds", str(last.seed), "--lr", str(last.lr), "--r", str(last.r)]
    assert quality.main([*arguments, *part]) == 0
    shown = capsys.readouterr().out
    assert f"{1 + nll(last):.4f}" in shown
    assert f"{1 + nll(runs[-2]):.4f}" not in shown  # which differs in its rank alone
    assert not list(folder.glob("*.png"))
    assert quality.main([*arguments, "--methods", "out", "--baseline", "out"]) == 0
    shown = capsys.readouterr().out
    assert "│ out " in shown and "│ lora " not in shown
    assert quality.main([*arguments, *part, "--rows", "all"]) == 0
    assert f"{0.5 + nll(last):.4f}" in capsys.readouterr().out
    assert quality.main(arguments) == 0
    assert list(folder.glob("*.png"))


def test_results_are_whole_files(plan, tmp_path, monkeypatch):
    setting, runs = quality.read_plan(plan)
    monkeypatch.setattr(quality, "Bench", lambda *args: CountingBench(100))
    quality.do_runs(setting, runs, tmp_path, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(f"{run.id}.json" for run in runs)
    for path in (tmp_path / "out").iterdir():
        json.loads(path.read_text())


def adapted_by(method, r=2):
    from benchmarks.methods import attach

    torch.manual_seed(0)
    return attach(tiny_llama(), method, r)


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("method", "added_per_layer"),
    [
        ({"kind": "lslora"}, 7),
        ({"kind": "lslora", "num_knots": 9, "learns": ["weight"]}, 9),
        ({"kind": "lslora", "learns": ["output_scale_offset"]}, 1),
        ({"kind": "lslora", "learns": []}, 0),
        ({"kind": "form", "placement": "weight", "shape": "sine"}, 0),
        ({"kind": "form", "placement": "bottleneck", "knots": 5, "learns": ["offsets"], "per_channel": True}, 10),
        ({"kind": "rslora"}, 0),
    ],
)
def test_methods_train_what_they_say(method, added_per_layer):
    plain = trained(adapted_by({"kind": "lora"}))
    assert trained(adapted_by(method)) == plain + 28 * added_per_layer  # 4 blocks of 7 linear layers


def test_splines_below_the_first_do_not_learn():
    model = adapted_by({"kind": "lslora", "first_spline": 3})
    for i, layer in enumerate(model.get_decoder().layers):
        assert all(p.requires_grad == (i >= 3) for spline in splines_of(layer) for p in spline.parameters())
        assert all(p.requires_grad for name, p in layer.named_parameters() if ".lora_A." in name or ".lora_B." in name)


def test_the_model_as_it_is_has_no_adapter():
    model = adapted_by({"kind": "none"})
    assert trained(model) == 0
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_a_run_trains_and_measures_what_it_names(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("LSLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").symlink_to(tiny)
    question = {
        "instruction": "Please choose the correct answer to the question: is rose red?\n\n"
        "Answer1: true Answer2: false\n\nAnswer format: answer1/answer2",
        "input": "",
        "output": "the correct answer is answer1",
        "answer": "answer1",
    }
    (tmp_path / "retained.jsonl").write_text("\n".join([json.dumps(question)] * 3))
    setting = Setting("data/model", "data/train.jsonl", "data/train.jsonl", first_layer=1, steps=3, batch_size=2,
                      retained="retained.jsonl", retained_rows=2)  # fmt: skip
    bench = Bench(setting, tmp_path)
    before = bench.measure(Run("none", {"kind": "none"}, 2, 0.0, 0))
    after = bench.measure(Run("out", {"kind": "lslora", "spline_lr_ratio": 2.0}, 2, 1e-2, 0))
    by_rate = bench.measure(Run("out", {"kind": "lslora", "spline_lr": 0.02}, 2, 1e-2, 0))
    as_slow = bench.measure(Run("out", {"kind": "lslora"}, 2, 1e-2, 0))
    assert by_rate["splines"] == after["splines"] != as_slow["splines"]
    assert before["losses"] == [] and len(after["losses"]) == 3
    for part, rows in (("validation", 24), ("retained", 2)):
        assert len(before[part]["row_nll"]) == len(after[part]["row_nll"]) == rows
        assert before[part]["nll"] != after[part]["nll"]
    assert before["validation"]["nll"] == pytest.approx(evaluate(bench.model, bench.measured["validation"])["nll"])
    assert len(after["splines"]) == 7 and "splines" not in before


def test_a_plan_says_how_matrices_are_multiplied(tiny):
    paths = ("model", "train.jsonl", "train.jsonl")
    Bench(Setting(*paths, matmul_precision="high"), tiny)
    assert torch.get_float32_matmul_precision() == "high"
    Bench(Setting(*paths), tiny)
    assert torch.get_float32_matmul_precision() == "highest"


def test_extra_rank_keeps_the_scaling_of_alpha_over_r():
    model = adapted_by({"kind": "lora", "extra_rank": 1})
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (3, 4)


def heights_after_a_step(**options):
    """Offsets of the first spline after an Adam step from a generic place, and the knots' own gradients there."""
    model = adapted_by({"kind": "lslora", "num_knots": 9, "spline_reg_weight": 0.0, **options})
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    spline = next(m for m in model.modules() if isinstance(m, Spline))
    cross_entropy(*completion_logits(model, collate(examples()))).backward()
    torch.optim.Adam([spline.weight], lr=0.1).step()
    return spline.weight.detach(), spline.weight.grad


def test_odd_splines_stay_odd_under_adam():
    heights, _ = heights_after_a_step(constraint="odd")
    assert heights.abs().max() > 0.05
    assert torch.equal(heights, -heights.flip(0))
    free, _ = heights_after_a_step()
    assert not torch.equal(free, -free.flip(0))


def test_smooth_gradients_are_means_over_neighbours():
    _, free = heights_after_a_step()
    _, smooth = heights_after_a_step(constraint="smooth")
    torch.testing.assert_close(smooth[4], free[2:7] @ torch.tensor([1.0, 4, 6, 4, 1]) / 16)
    torch.testing.assert_close(smooth[0], free[:3] @ torch.tensor([11.0, 4, 1]) / 16)


def test_unknown_methods_and_options_raise():
    with pytest.raises(ValueError, match="kind must be one of .*, got 'lorra'"):
        adapted_by({"kind": "lorra"})
    with pytest.raises(ValueError, match="lora takes no options, got \\['num_knots'\\]"):
        adapted_by({"kind": "lora", "num_knots": 5})
    with pytest.raises(ValueError, match="hira takes no options, got \\['alpha_ratio'\\]"):
        adapted_by({"kind": "hira", "alpha_ratio": 10})
    with pytest.raises(ValueError, match="spline_hold is for the splines of lslora, got kind 'form'"):
        adapted_by({"kind": "form", "placement": "output", "shape": "leaky", "spline_hold": 0.8})


def test_hira_multiplies_the_base_weight():
    layer = adapted_by({"kind": "hira"}, r=3).get_decoder().layers[0].mlp.up_proj
    a, b = layer.hira_A["default"], layer.hira_B["default"]
    torch.nn.init.normal_(b)
    x, w0 = torch.randn(5, 16), layer.base_layer.weight
    assert a.shape == (3, 16)
    torch.testing.assert_close(layer(x), x @ (w0 * (1 + b @ a)).T)


@pytest.mark.parametrize("placement", ["output", "bottleneck", "weight", "factor"])
@pytest.mark.parametrize(
    ("shape", "function"),
    [("sine", lambda t: math.sin(math.pi * t) / math.pi), ("clip", lambda t: max(-1.0, min(1.0, t)))],
)
def test_forms_in_closed_form(placement, shape, function):
    from benchmarks.forms import Form

    model = adapted_by({"kind": "form", "placement": placement, "shape": shape, "width": 0.5})
    layer = model.get_decoder().layers[0].mlp.up_proj
    a, b, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    torch.nn.init.normal_(b)
    x = torch.randn(5, 16)
    assert isinstance(layer.lora_form, Form)
    h = x @ a.T
    sigma = 0.5 * h.abs().flatten().quantile(0.99).item() if placement == "bottleneck" else 0.5
    phi = lambda z: (z / sigma).detach().double().apply_(function) * sigma  # noqa: E731
    update = {
        "output": lambda: phi(scaling * h @ b.T),
        "bottleneck": lambda: scaling * phi(h) @ b.T.double(),
        "weight": lambda: x.double() @ phi(scaling * b @ a).T,
        "factor": lambda: scaling * h.double() @ phi(b).T,
    }[placement]()
    torch.testing.assert_close((layer(x) - layer.base_layer(x)).double(), update, rtol=1e-4, atol=1e-4)


PLACES = ["input", "whole", "token", "gate", "base", "product", "output", "bottleneck", "factor"]


@pytest.mark.parametrize("place", PLACES)
def test_deltas_in_closed_form(place):
    model = adapted_by({"kind": "delta", "place": place, "knots": 5, "waits": 2})
    layer = model.get_decoder().layers[0].mlp.up_proj
    a, b, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    torch.nn.init.normal_(b)
    x = torch.randn(5, 16)
    w0, delta = layer.base_layer.weight, layer.lora_delta
    unit = w0 / w0.square().mean().sqrt()
    plain = x @ w0.T + s * x @ (b @ a * (unit if place == "product" else 1)).T
    with torch.no_grad():
        delta.offsets.copy_(torch.tensor([0.3, -0.2, 0.1, 0.5, 0.4]))
    model.train()
    torch.testing.assert_close(layer(x), plain)
    result = layer(x)
    model.eval()
    torch.testing.assert_close(layer(x), result)

    def expected(t, in_sigma):
        sigma = t.abs().flatten().quantile(0.99).item()
        grid = np.linspace(-sigma, sigma, 5)
        found = np.interp(t.detach().numpy(), grid, delta.offsets.detach().numpy())
        return torch.from_numpy(found * (sigma if in_sigma else 1)).float()

    h = x @ a.T
    update = {
        "input": lambda: s * (x + expected(x, True)) @ a.T @ b.T,
        "whole": lambda: plain - x @ w0.T + expected(plain, True),
        "token": lambda: s * (h * (1 + expected(h.norm(dim=-1, keepdim=True), False))) @ b.T,
        "gate": lambda: s * h @ b.T * (1 + expected(x @ w0.T, False)),
        "base": lambda: s * x @ (b @ a * (1 + expected(w0, False))).T,
        "product": lambda: s * x @ (b @ a * (unit + expected(w0, False))).T,
        "output": lambda: s * h @ b.T + expected(s * h @ b.T, True),
        "bottleneck": lambda: s * (h + expected(h, True)) @ b.T,
        "factor": lambda: s * h @ (b + expected(b, True)).T,
    }[place]()
    torch.testing.assert_close(result, x @ w0.T + update, rtol=1e-4, atol=1e-4)


def test_a_gated_delta_starts_at_zero_and_becomes_a_sine():
    model = adapted_by({"kind": "delta", "place": "output", "knots": 9, "waits": 1, "gated": True})
    layer = model.get_decoder().layers[0].mlp.up_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(5, 16)
    z = layer.scaling["default"] * x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    plain = layer(x)
    torch.testing.assert_close(plain, layer.base_layer(x) + z)
    plain.sum().backward()
    assert layer.lora_delta.gate.grad.abs() > 0  # it can leave zero
    with torch.no_grad():
        layer.lora_delta.gate.fill_(0.5)
    sigma = z.abs().flatten().quantile(0.99).item()
    grid = np.linspace(-sigma, sigma, 9)
    sine = torch.from_numpy(np.interp(z.detach().numpy(), grid, np.sin(np.linspace(-1, 1, 9) * np.pi))).float()
    torch.testing.assert_close(layer(x), plain + 0.5 * sigma * sine, rtol=1e-4, atol=1e-4)


def test_the_splines_rate_stays_where_it_is_told_to(tmp_path):
    rates = []

    class Seen(TrainerCallback):
        def on_step_begin(self, *args, optimizer=None, **kwargs):
            rates.append([group["lr"] for group in optimizer.param_groups if group["params"]])

    steps = {"max_steps": 8, "warmup_steps": 2, "learning_rate": 0.1}
    args = TrainingArguments(tmp_path, **steps, remove_unused_columns=False, report_to="none")
    shared = {"train_dataset": examples(), "data_collator": collate, "callbacks": [Seen()]}
    model = adapted_by({"kind": "lslora"})
    CompletionTrainer(model, args, **shared, spline_lr=0.5, spline_hold=0.5).train()
    plain, spline = zip(*rates, strict=True)
    assert plain == pytest.approx([0, 0.05, 0.1, 0.1 * 5 / 6, 0.1 * 4 / 6, 0.05, 0.1 * 2 / 6, 0.1 / 6])
    assert spline == pytest.approx([0, 0.25, 0.5, 0.5, 0.5, 0.375, 0.25, 0.125])


def test_a_splines_rate_is_given_as_a_ratio_or_itself():
    def rate(**method):
        return spline_lr(Run("spline", {"kind": "lslora", **method}, r=4, lr=0.004, seed=0))

    assert (rate(), rate(spline_lr_ratio=20.0), rate(spline_lr=0.1)) == (0.004, 0.08, 0.1)
    with pytest.raises(ValueError, match="spline must have spline_lr or spline_lr_ratio, got both"):
        rate(spline_lr=0.1, spline_lr_ratio=20.0)


def test_deltas_are_trained_at_a_learning_rate_of_their_own():
    from benchmarks.forms import separate_form_group

    model = adapted_by({"kind": "delta", "place": "token", "knots": 5, "waits": 1})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    separate_form_group(optimizer, model, 0.5)
    deltas = {id(p) for name, p in model.named_parameters() if "lora_delta" in name}
    assert deltas and {id(p) for p in optimizer.param_groups[1]["params"]} == deltas
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]


def test_defects_of_the_ablation_are_there_and_v7_is_the_method():

    _, runs = quality.read_plan(Path(quality.__file__).parent / "plans" / "ablation.toml")
    methods = {run.name: run for run in runs}
    first = next(m for m in adapted_by(methods["v0"].method).modules() if isinstance(m, Spline))
    grid = torch.linspace(-1, 1, 5)
    torch.testing.assert_close(first.values, grid + 0.2 * torch.sin(math.pi * grid))
    assert first.output_scale.item() == pytest.approx(0.1)
    assert first.interpolation_method == "soft" and first.spline_reg_weight == 1e-4
    torch.testing.assert_close(first(torch.full((3,), 50.0)), first(torch.full((3,), 5.0)))  # tanh
    last = next(m for m in adapted_by(methods["v7"].method).modules() if isinstance(m, Spline))
    plain = next(m for m in adapted_by({"kind": "lslora"}).modules() if isinstance(m, Spline))
    assert str(last) == str(plain) and last.spline_reg_weight == plain.spline_reg_weight
    assert {run.lr for run in runs if run.name in ("v7", "lora")} == {2e-4}
    assert [run.name for run in runs] == [*(f"v{i}" for i in range(8)), "lora"]


def test_every_version_of_the_ablation_differs_from_the_one_before_in_one_thing():
    _, runs = quality.read_plan(Path(quality.__file__).parent / "plans" / "ablation.toml")
    for before, after in pairwise(runs[:8]):
        flat = [{**r.method, **r.method.get("defects", {}), "lr": r.lr} for r in (before, after)]
        for options in flat:
            options.pop("defects", None)
        changed = {k for k in flat[0].keys() | flat[1].keys() if flat[0].get(k) != flat[1].get(k)}
        assert len(changed - {"k_min", "k_max"}) + ("k_min" in changed) == 1, (before.name, after.name, changed)


def test_rows_are_spread_over_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {**QUESTION, "instruction": f"{'long ' * (i % 2) * 40} {i}\n\nAnswer format: true/false"} for i in range(20)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = Words()
    every = load_examples(path, tokenizer, max_tokens=30)
    assert len(every) == 10
    assert all(len(example["input_ids"]) < 30 for example in every)
    some = load_examples(path, tokenizer, max_tokens=30, max_rows=5)
    assert [e["input_ids"].tolist() for e in some] == [e["input_ids"].tolist() for e in every[::2]]


def test_the_ablation_is_told_beside_the_claims(tmp_path, capsys, monkeypatch):
    from benchmarks import ablation

    folder = tmp_path / "ablation"
    folder.mkdir()
    setting, runs = quality.read_plan(ablation.PLAN)
    for place, run in enumerate(runs):
        done = {"run": {**vars(run)}, "setting": vars(setting), "validation": {"nll": 1.0 - 0.1 * place}}
        (folder / f"{run.id}.json").write_text(json.dumps(done))
    monkeypatch.setattr(quality, "Bench", lambda *args: pytest.fail("every run is there"))
    assert ablation.main(["--results", str(tmp_path)]) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    lines = [" ".join(row) for row in rows if row[1].strip()]  # without the continuation of a long text
    assert [line.split()[0] for line in lines] == [*(f"V{i}" for i in range(8)), "LORA"]
    assert "1.0000" in lines[0] and "broken" in lines[0]
    assert "0.3000" in lines[7] and "-0.1000" in lines[7] and "82 to 85" in lines[7]
    assert (folder / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_function_is_worth_starts_from_the_finished_lora(tiny, tmp_path, monkeypatch, capsys):
    from benchmarks import worth

    monkeypatch.setenv("LSLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").symlink_to(tiny)
    plan = tmp_path / "plan.toml"
    plan.write_text(
        '[setting]\nmodel = "data/model"\ntrain = "data/train.jsonl"\nvalidation = "data/train.jsonl"\nsteps = 3\n'
        "batch_size = 2\nwarmup_steps = 0\n[methods]\n[[runs]]\nmethods = []\nr = []\nlr = []\nseeds = []\n"
    )
    monkeypatch.setattr(worth, "PLAN", plan)
    monkeypatch.setattr(worth, "LORA_LR", 0.1)
    both = ["A and B", "A, B and output"]

    def changes():
        assert worth.main(["--data", str(tmp_path), "--r", "2", "--lr", "0.05"]) == 0
        first, *lines = capsys.readouterr().out.splitlines()
        assert first.startswith("LoRA, r = 2, 0.05: nll ")
        assert [line.split(":")[0] for line in lines] == [*(f"{f} alone" for f in worth.FUNCTIONS), *both]
        return [float(line.split("(")[1].split()[0]) for line in lines]

    found = changes()
    assert all(found) and found[-1] != found[-2]
    monkeypatch.setattr(worth, "FUNCTION_LR", 1e-9)
    *alone, without, with_one = changes()
    assert alone == [0.0] * len(worth.FUNCTIONS) and with_one == without != 0


def test_several_states_are_measured_by_their_mean(tiny, tmp_path, monkeypatch):
    """At a constant rate a training's states are the ends of shorter ones."""
    monkeypatch.setenv("LSLORA_CACHE", str(tmp_path / "cache"))
    shared = {"model": "model", "train": "train.jsonl", "validation": "train.jsonl", "schedule": "constant"}
    run = Run("out", {"kind": "lslora", "spline_lr_ratio": 20.0}, r=2, lr=0.05, seed=0)

    def measured(steps, states=1):
        bench = Bench(Setting(**shared, steps=steps, states=states, warmup_steps=0, batch_size=2), tiny)
        return bench.measure(run)["validation"]

    found, first, last = measured(7, states=2), measured(2), measured(7)
    assert first["nll"] != last["nll"]
    assert found["nll"] == pytest.approx((first["nll"] + last["nll"]) / 2)
    assert found["row_nll"] == pytest.approx(
        [sum(pair) / 2 for pair in zip(first["row_nll"], last["row_nll"], strict=True)]
    )


@pytest.mark.parametrize(("states", "steps"), [(0, 60), (2, 5), (13, 60)])
def test_states_that_do_not_fit_raise(states, steps):
    paths = {"model": "m", "train": "t", "validation": "v"}
    with pytest.raises(ValueError, match=f"{states} states 5 steps apart do not fit into {steps} steps"):
        Setting(**paths, states=states, steps=steps)
    assert Setting(**paths, states=2, steps=6).states == 2 and Setting(**paths, states=12, steps=60).states == 12


def test_several_processes_share_a_plan(tiny, tmp_path):
    (tmp_path / "data").symlink_to(tiny)
    plan = tmp_path / "shared.toml"
    plan.write_text(
        '[setting]\nmodel = "data/model"\ntrain = "data/train.jsonl"\nvalidation = "data/train.jsonl"\nsteps = 2\n'
        '[methods]\nlora = { kind = "lora" }\n[[runs]]\nmethods = ["lora"]\nr = [2]\nlr = [1e-3]\nseeds = [0, 1, 2]\n'
    )
    script = Path(__file__).parents[1] / "benchmarks" / "run_gpu_quality.sh"
    place = {"DATA": str(tmp_path), "OUT": str(tmp_path / "out"), "PROCESSES": "2"}
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def run():
        return subprocess.run(
            ["bash", script, plan], env={**os.environ, **place, "PATH": search}, capture_output=True, text=True
        )

    first = run()
    assert first.returncode == 0, first.stderr
    assert sorted(path.name for path in (tmp_path / "out" / "shared").iterdir()) == [
        f"lora-r2-lr0.001-seed{seed}.json" for seed in range(3)
    ]
    assert first.stdout.count("nll") == 3
    plan.write_text(plan.read_text().replace("steps = 2", "steps = 3"))
    assert run().returncode != 0  # results of another setting
