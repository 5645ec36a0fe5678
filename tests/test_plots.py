"""Pictures that show what is in the records: read back from the figures' artists."""

import math

import numpy as np
import pytest
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgba

from lslora.plots import CELL, COLOURS, plot_course, plot_deviations, plot_heatmap, plot_occupancy, plot_splines


def record(layer, offset=0.0, knots=5, k=2.0, density=None, occupancy=None):
    grid = np.linspace(-k, k, knots)
    values = grid + offset * (np.arange(knots) == knots // 2)
    return {
        "layer": layer,
        "grid": grid.tolist(),
        "values": values.tolist(),
        "deviation": abs(offset) / knots,
        "slope_variance": float(np.var(np.diff(values) / np.diff(grid))),
        "input_scale": 1.0,
        "output_scale": 1.0,
        "grid_scale": 1.0,
        "density": density,
        "occupancy": occupancy,
    }


def blocks(depth, modules=("self_attn.q_proj", "mlp.down_proj"), **settings):
    return [record(f"model.layers.{i}.{name}", 0.1 * i, **settings) for i in range(depth) for name in modules]


def drawn(figure):
    figure.draw_without_rendering()
    return figure


def labels(axis):
    return [[label.get_text() for label in side] for side in (axis.get_yticklabels(), axis.get_xticklabels())]


def test_every_layer_has_its_place_its_curve_and_its_colour():
    figure = drawn(plot_splines(blocks(3)))
    (axis,) = figure.axes
    assert labels(axis) == [["0", "1", "2"], ["q_proj", "down_proj"]]
    identity, curves = (c for c in axis.collections if type(c) is LineCollection)
    assert len(identity.get_segments()) == len(curves.get_segments()) == 6
    for row in range(3):
        for column in range(2):
            points = curves.get_segments()[2 * row + column]
            # Half a grid of 2 is CELL wide; the middle knot is 0.1 · row above zero, and up is less.
            expected = [[-CELL, CELL], [-CELL / 2, CELL / 2], [0, -0.05 * row * CELL], [CELL / 2, -CELL / 2]]
            np.testing.assert_allclose(points[:4] - [column, row], expected, atol=1e-12)
    shown = [tuple(colour) for colour in curves.get_colors()[::2]]
    assert shown == [to_rgba(COLOURS[word]) for word in ("identity", "learning", "learning")]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["identity", "learning"]


def test_a_curve_that_leaves_the_grid_stays_in_its_cell():
    (axis,) = drawn(plot_splines([record("0", 100.0), record("1", math.nan)])).axes
    curves = [c for c in axis.collections if type(c) is LineCollection][1]
    assert np.abs(curves.get_segments()[0]).max() <= CELL
    assert labels(axis) == [["0", "1"], [""]]


def test_the_density_stands_behind_the_curve():
    observed = record("a.0.b", density=[0.1, 0.4, 0.2, 0.1], occupancy=[0.1, 0.5, 0.3, 0.1])
    (axis,) = drawn(plot_splines([observed, record("a.1.b")])).axes
    (outline,) = [c for c in axis.collections if type(c) is PolyCollection][1].get_paths()
    heights = CELL - outline.vertices[:10, 1]
    np.testing.assert_allclose(heights / (2 * CELL), [0, 0.25, 0.25, 1, 1, 0.5, 0.5, 0.25, 0.25, 0], atol=1e-12)
    np.testing.assert_allclose(outline.vertices[2:4, 0], [-CELL / 2, -CELL / 2])


def test_deviations_have_a_panel_a_module():
    figure = drawn(plot_deviations(blocks(4)))
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert list(panels) == ["q_proj", "down_proj"]
    middles = [line.get_ydata()[2] for line in panels["q_proj"].lines if len(line.get_ydata()) == 5]
    assert middles == pytest.approx([0, 0.1, 0.2, 0.3])


def test_heat_map_holds_the_numbers():
    records = blocks(3)[:-1]
    deviation, variance = (axis for axis in drawn(plot_heatmap(records)).axes if axis.images)
    shown = deviation.images[0].get_array()
    np.testing.assert_allclose(shown.filled(-1), [[0, 0], [0.02, 0.02], [0.04, -1]], atol=1e-12)
    assert variance.images[0].get_array()[1, 0] == pytest.approx(records[2]["slope_variance"])
    assert labels(deviation) == [["0", "1", "2"], ["q_proj", "down_proj"]]


def test_names_that_are_not_told_apart_by_their_ends_stay_whole():
    records = [
        record(f"{side}.layers.0.{name}.q_proj") for side in ("encoder", "decoder") for name in ("own", "cross")
    ]
    axis = drawn(plot_heatmap(records)).axes[0]
    assert labels(axis) == [["encoder.layers.0", "decoder.layers.0"], ["own.q_proj", "cross.q_proj"]]


def test_occupancy_of_those_that_were_observed():
    shares = [0.1, 0.2, 0.3, 0.3, 0.0, 0.1]
    axis = drawn(plot_occupancy([record("0", occupancy=shares), record("1")])).axes[0]
    np.testing.assert_allclose(axis.images[0].get_array(), [shares])
    assert labels(axis) == [["0"], ["below", "1", "2", "3", "4", "above"]]
    with pytest.raises(ValueError, match="observed in some layer"):
        plot_occupancy([record("0")])


@pytest.mark.parametrize("draw", [plot_splines, plot_deviations, plot_heatmap])
def test_no_records_are_no_picture(draw):
    with pytest.raises(ValueError, match="records must have a layer, got none"):
        draw([])


def test_a_course_without_entries_is_refused():
    with pytest.raises(ValueError, match="fewer steps than logging_steps"):
        plot_course([])


def test_course_has_every_layer_and_the_mean():
    course = [{"step": s, "layers": {"a": [0.1 * s, 0.0], "b": [0.3 * s, 1.0]}} for s in (1, 2, 5)]
    deviation, variance = drawn(plot_course(course)).axes[:2]
    found = [line.get_ydata().tolist() for line in deviation.lines]
    assert found == [pytest.approx(x) for x in ([0.1, 0.2, 0.5], [0.3, 0.6, 1.5], [0.2, 0.4, 1.0])]
    assert [list(line.get_xdata()) for line in deviation.lines] == [[1, 2, 5]] * 3
    assert variance.lines[-1].get_ydata().tolist() == [0.5] * 3
