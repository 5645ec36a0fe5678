"""Records against closed forms, occupancy against numpy, and pictures that show what is in the records."""

import io
import json

import numpy as np
import pytest
import torch
from peft import get_peft_model
from rich.console import Console
from torch import nn

from lslora import LSLoraConfig
from lslora.diagnostics import (
    live_intervals,
    observe_occupancy,
    plot_splines,
    save_records,
    spline_metrics,
    spline_records,
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
    assert live_intervals(record) == 1.0
    assert live_intervals({"occupancy": [0.0, 0.995, 0.005, 0.0]}) == 0.5


def test_files(tmp_path):
    model = make_model(layers=3)
    for i in range(3):
        spline_of(model, i).values = spline_of(model, i).grid + 0.1 * i
    records = spline_records(model)
    save_records(records, tmp_path / "spline_diagnostics.json")
    saved = json.loads((tmp_path / "spline_diagnostics.json").read_text())
    assert [layer["verdict"] for layer in saved["layers"]] == ["identity", "learning", "learning"]
    assert saved["verdicts"] == {"identity": 1, "learning": 2}
    assert saved["mean"]["deviation"] == pytest.approx(0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["spline_diagnostics.json"]

    text = io.StringIO()
    Console(width=160, file=text).print(spline_table(records, max_rows=2))
    text = text.getvalue()
    assert "0.2000" in text and "learning" in text and "mean of 3" in text and "identity" not in text


@pytest.mark.parametrize(("layers", "panels"), [(3, 3), (101, 2)])
def test_picture_has_a_panel_a_layer_or_one_a_module_type(tmp_path, monkeypatch, layers, panels):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **kwargs: drawn.append(figure))
    grid = [-1.0, 0.0, 1.0]
    records = [
        {"layer": f"model.layers.{i}.{'q_proj' if i % 2 else 'v_proj'}", "grid": grid, "values": [-1.0, 0.1 * i, 1.0]}
        for i in range(layers)
    ]
    plot_splines(records, tmp_path / "picture.png")
    axes = [axis for axis in drawn[0].axes if axis.get_visible() and axis.get_title()]
    assert len(axes) == panels
    curves = [line.get_ydata()[1] for axis in axes for line in axis.lines if len(line.get_ydata()) == 3]
    assert sorted(curves) == pytest.approx([0.1 * i for i in range(layers)])
