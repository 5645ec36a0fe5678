"""The timing itself: providers that compute the same, memory that is known, ratios by hand, records that add up."""

import json

import pytest
import torch
from torch import nn

from benchmarks import draw_speed, inference, kernels, layer, timing, train_step
from benchmarks.providers import CONFIGS, attach


@pytest.fixture
def no_tests(monkeypatch):
    """Of the operations, which these tests are run with anyway."""
    monkeypatch.setattr(timing, "check_tests", lambda: None)


def trained(provider, dtype):
    """The output and every gradient of a layer, by name."""
    torch.manual_seed(0)
    model = attach(nn.Sequential(nn.Linear(8, 6, bias=False)), provider, ["0"])
    for parameter in model.parameters():
        parameter.data = 5 * parameter.data.to(dtype)
    y = model(torch.linspace(-3, 3, 40).view(5, 8).to(dtype))
    y.square().sum().backward()
    return {"y": y.detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("provider", ["lslora_reference", "seed_naive"])
def test_plainer_ways_compute_what_ours_does(provider):
    """In float64; in float32, where ours is another operation, ours is no further from it than twice theirs."""
    exact, plain = trained("lslora", torch.float64), trained(provider, torch.float64)
    ours, theirs = trained("lslora", torch.float32), trained(provider, torch.float32)
    for name, value in exact.items():
        torch.testing.assert_close(plain[name], value, msg=name)
        assert (ours[name] - value).norm() <= 2 * (theirs[name] - value).norm(), name


def test_without_an_adapter_nothing_learns():
    assert not any(p.requires_grad for p in attach(nn.Linear(2, 2), "base").parameters())


def test_every_round_times_everything_but_the_first():
    calls = []
    seconds = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, "cpu")
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert timing.summary([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])["median"] == 3.5


def test_peak_memory_is_what_is_held_at_once():
    def step():
        first = torch.empty(1000, dtype=torch.float64)
        second = torch.empty(500, dtype=torch.float64)
        del first
        return second + 1

    assert timing.peak_bytes(step, "cpu") == 12_000


def test_ratios_are_geometric_means_over_shapes():
    def result(provider, shape, seconds):
        return {"model": "m", "shape": shape, "tokens": 2, "provider": provider, "median": seconds}

    results = [
        *(result("peft_lora", shape, 2.0) for shape in ((1, 1), (2, 2))),
        result("lslora", (1, 1), 1.0),
        result("lslora", (2, 2), 16.0),
    ]
    assert layer.ratios(results, "median")["all"] == pytest.approx({"peft_lora": 1.0, "lslora": 2.0})


def test_records_are_added_and_drawn(no_tests, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(layer.SHAPES, "SmolLM2-135M", [(8, 6), (6, 8)])
    out = tmp_path / "layer.json"
    for _ in range(2):
        assert layer.main(["--out", str(out), "--models", "SmolLM2-135M", "--tokens", "4", "--rounds", "2"]) == 0
    first, second = json.loads(out.read_text())
    assert len(first["results"]) == len(second["results"]) == 2 * len(CONFIGS)
    assert {"device", "threads", "versions", "commit"} <= first.keys()
    assert all(len(result["seconds"]) == 2 and result["peak_bytes"] > 0 for result in first["results"])
    draw_speed.main([str(out)])
    assert out.with_suffix(".png").stat().st_size > 1000


def test_whole_models_are_timed(no_tests, tmp_path, monkeypatch):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50, "pad_token_id": 0}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    monkeypatch.setitem(train_step.SHAPES, "Phi-3-mini", train_step.Phi3Config(**small))
    shared = ["--model", "Phi-3-mini", "--tokens", "5", "--rounds", "2", "--out", str(tmp_path / "speed.json")]
    assert train_step.main([*shared, "--rows", "2", "--gradient_checkpointing"]) == 0
    assert inference.main([*shared, "--batch", "1", "3"]) == 0
    trained, asked = json.loads((tmp_path / "speed.json").read_text())
    assert [result["provider"] for result in trained["results"]] == list(train_step.PROVIDERS)
    assert len(asked["results"]) == 2 * 2 * len(inference.PROVIDERS)  # batches, phases


def test_nothing_is_timed_while_the_operations_are_wrong(monkeypatch):
    monkeypatch.setattr(timing, "TESTS", ("tests/no_such_file.py",))
    with pytest.raises(RuntimeError, match="the operations' tests fail, so nothing is timed"):
        timing.check_tests()


def test_kernels_are_held_against_the_bytes(monkeypatch):
    """Every way and pass runs, here with times that are made up."""
    calls = []

    def kernel_times(call):
        calls.append(call())
        return {"first": 2e-6, "second": 1e-6}

    monkeypatch.setattr(kernels, "WHERE", {"device": "cpu", "dtype": torch.float32})
    monkeypatch.setattr(kernels, "kernel_times", kernel_times)
    results = kernels.measure(8, 12)
    assert [(found["way"], found["pass"]) for found in results] == [
        (way, name) for way in ("peft_lora", "lslora", "lslora_recommended") for name in ("forward", "backward")
    ]
    assert [(found["seconds"], found["floor"]) for found in results[:2]] == [(3e-6, 3e-6), (3e-6, 1.5e-6)]
    for forward, backward in zip(calls[3::2], calls[4::2], strict=True):  # of ours, after the copy and plain LoRA
        assert forward.shape == (8, 12)
        assert all(gradient.isfinite().all() and gradient.any() for gradient in backward)
    assert list(kernels.table(results).columns[3].cells) == ["3 (1.00)", "3 (2.00)"]
