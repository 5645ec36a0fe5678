"""Records against closed forms, occupancy against numpy, and pictures that show what is in the records."""

import io
import json

import numpy as np
import pandas
import pytest
import torch
from peft import get_peft_model
from rich.console import Console
from torch import nn

from lslora import LSLoraConfig
from lslora.diagnostics import (
    BINS,
    Occupancy,
    observe_occupancy,
    spline_metrics,
    spline_records,
    trained_records,
)
from lslora.records import (
    averages,
    live_intervals,
    load_records,
    mean_live,
    mean_metrics,
    save_records,
    spline_table,
    verdict,
)


def make_model(layers=2, **settings):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)))
    return get_peft_model(net, LSLoraConfig(r=2, target_modules=r"\d+", init_lora_weights=False, **settings))


def spline_of(model, layer=0):
    return model.base_model.model[layer].lora_spline["default"]


def test_record_of_a_known_spline():
    model = make_model()
    spline_of(model).values = [-3.5, -1.5, 0.0, 2.0, 3.0]
    spline_of(model).output_scale = 0.9
    first, second = spline_records(model)
    slopes = np.diff([-3.5, -1.5, 0.0, 2.0, 3.0]) / 1.5
    assert first["layer"] == "0" and first["grid"] == [-3.0, -1.5, 0.0, 1.5, 3.0]
    assert first["deviation"] == pytest.approx(np.mean([0.5, 0, 0, 0.5, 0]))
    assert first["slope_variance"] == pytest.approx(slopes.var(), rel=1e-5)
    assert first["output_scale"] == pytest.approx(0.9) and first["input_scale"] == 1
    assert (second["deviation"], second["slope_variance"], second["occupancy"]) == (0, 0, None)
    metrics = spline_metrics(model)
    assert metrics["spline/deviation"] == pytest.approx(0.1)
    assert metrics["spline/output_scale"] == pytest.approx(0.95)


def test_models_without_splines():
    assert spline_metrics(nn.Linear(2, 2)) == {}
    with pytest.raises(ValueError, match="an adapter named 'other', found none"):
        spline_records(make_model(), adapter_name="other")


@pytest.mark.parametrize(
    ("deviation", "slope_variance", "word"),
    [
        (0.0, 0.0, "identity"),
        (0.001, 0.0, "barely moved"),
        (0.02, 0.01, "learning"),
        (0.3, 0.2, "curved"),
        (1.5, 0.2, "overfitting"),
        (1.5, 1.5, "unstable"),
        (float("nan"), 0.0, "not finite"),
    ],
)
def test_verdicts(deviation, slope_variance, word):
    assert verdict({"deviation": deviation, "slope_variance": slope_variance}) == word


def test_occupancy_counts_z_in_the_intervals():
    model = make_model(layers=1, k_min=-0.5, k_max=0.5, num_knots=3).eval()
    seen = []
    spline_of(model).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().flatten()))
    with observe_occupancy(model) as occupancy:
        for _ in range(3):
            model(torch.randn(50, 6))
    model(torch.randn(50, 6))  # no longer observed
    z = torch.cat(seen[:3]).numpy()
    expected = np.histogram(z, [-np.inf, -0.5, 0.0, 0.5, np.inf])[0] / z.size
    (record,) = spline_records(model, occupancy=occupancy)
    np.testing.assert_allclose(record["occupancy"], expected)
    assert min(expected) > 0
    bins = np.histogram(z, np.linspace(-0.5, 0.5, BINS + 1))[0] / z.size
    np.testing.assert_allclose(record["density"], bins)
    assert live_intervals(record) == 1.0
    assert live_intervals({"occupancy": [0.0, 0.995, 0.005, 0.0]}) == 0.5


def test_what_is_no_number_counts_as_above_the_grid():
    spline = spline_of(make_model(layers=1, k_min=-0.5, k_max=0.5, num_knots=3))
    occupancy = Occupancy()
    occupancy.add("layer", spline, torch.tensor([-torch.inf, -3e38, -0.4, 0.4, 3e38, torch.inf, torch.nan]))
    below, *inner, above = occupancy.counts["layer"].tolist()
    assert (below, sum(inner[: BINS // 2]), sum(inner[BINS // 2 :]), above) == (2, 1, 1, 3)


def test_nothing_has_no_averages(tmp_path):
    assert mean_metrics([]) == {} and mean_live([]) is None
    for use in (averages, spline_table, lambda records: save_records(records, tmp_path / "none.json")):
        with pytest.raises(ValueError, match="records must have a layer, got none"):
            use([])
    assert not list(tmp_path.iterdir())


def test_files(tmp_path):
    model = make_model(layers=3)
    for i in range(3):
        spline_of(model, i).values = spline_of(model, i).grid + 0.1 * i
    records = spline_records(model)
    save_records(records, tmp_path / "spline_diagnostics.json")
    loaded = load_records(tmp_path / "spline_diagnostics.json")
    assert [record | {"verdict": verdict(record)} for record in records] == loaded
    table = pandas.DataFrame(loaded)
    assert list(table["layer"]) == ["0", "1", "2"] and table["deviation"].mean() == pytest.approx(0.1)
    saved = json.loads((tmp_path / "spline_diagnostics.json").read_text())
    assert [layer["verdict"] for layer in saved["layers"]] == ["identity", "learning", "learning"]
    assert saved["verdicts"] == {"identity": 1, "learning": 2}
    assert saved["mean"]["deviation"] == pytest.approx(0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["spline_diagnostics.json"]

    text = io.StringIO()
    Console(width=160, file=text).print(spline_table(records, max_rows=2))
    text = text.getvalue()
    assert "0.2000" in text and "learning" in text and "mean of 3" in text and "identity" not in text


def test_records_of_what_is_trained():
    """Those of the adapters that learn, whatever their names; averages over all of them."""
    model = make_model(layers=2)
    config = LSLoraConfig(r=2, target_modules=["0"], num_knots=3)
    model.add_adapter("other", config)
    assert [record["layer"] for record in trained_records(model)] == ["0", "1"]
    model.set_adapter("other")
    model.base_model.model[0].lora_spline["other"].values = [-3.0, 0.6, 3.0]
    (record,) = trained_records(model)
    assert record["deviation"] == pytest.approx(0.2)
    assert spline_metrics(model) == mean_metrics([record])
    model.base_model.model[0].lora_spline["default"].requires_grad_(True)
    assert sorted(record["deviation"] for record in trained_records(model)) == [0, pytest.approx(0.2)]


@pytest.mark.parametrize("content", ["{}", "[]", "no JSON", '{"layers": 3}'])
def test_other_files_are_no_records(tmp_path, content):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(ValueError, match="file.json must be a file that save_records wrote"):
        load_records(tmp_path / "file.json")
