"""The statistics, against counts and distributions worked out independently."""

import itertools
import math
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from lslora import scoring


@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (0, 11), (11, 11), (83, 100), (1, 250), (4999, 9999)])
def test_wilson_limits_solve_their_equation(correct, total):
    """The limits are where the score test just rejects: (p - limit)^2 = z^2 limit (1 - limit) / n."""
    for limit in scoring.wilson_interval(correct, total):
        distance = (correct / total - limit) ** 2
        assert distance == pytest.approx(1.959963984540054**2 * limit * (1 - limit) / total, abs=1e-12)
    low, high = scoring.wilson_interval(correct, total)
    assert 0 <= low <= correct / total <= high <= 1
    assert low < high


def test_wilson_published_value():
    """81 of 263: 0.2553 to 0.3662 (Newcombe 1998, Statistics in Medicine 17, table I, method 3)."""
    assert scoring.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (2, 1), (-1, 3)])
def test_wilson_refuses_impossible_counts(correct, total):
    with pytest.raises(ValueError, match=f"got correct={correct}, total={total}"):
        scoring.wilson_interval(correct, total)


def predictions(*outcomes, task="t", start=0):
    """One prediction for every character: 1 right, 0 wrong, - not readable."""
    return [
        {
            "index": start + i,
            "task": task,
            "answer": "true",
            "prediction": {"1": "true", "0": "false", "-": None}[outcome],
            "correct": outcome == "1",
        }
        for i, outcome in enumerate("".join(outcomes))
    ]


def test_summary_of_two_tasks_of_unequal_size():
    items = predictions("1110", task="a") + predictions("0-", task="b", start=4)
    summary = scoring.summarize(items)
    assert {task: (f["n"], f["accuracy"], f["unparsed"]) for task, f in summary["tasks"].items()} == {
        "a": (4, 0.75, 0.0),
        "b": (2, 0.0, 0.5),
    }
    assert summary["micro"]["accuracy"] == 0.5
    assert summary["micro"]["interval"] == [*scoring.wilson_interval(3, 6)]
    assert summary["micro"]["unparsed"] == pytest.approx(1 / 6)
    assert summary["macro"]["accuracy"] == 0.375
    assert summary["macro"]["n"] == 2


def test_macro_interval_of_one_task_is_the_tasks_own():
    summary = scoring.summarize(predictions("11010"))
    assert summary["macro"]["interval"] == pytest.approx(summary["tasks"]["t"]["interval"])


def test_macro_interval_of_two_like_tasks_is_narrower_by_the_root_of_two():
    summary = scoring.summarize(predictions("11010", task="a") + predictions("11010", task="b", start=5))
    low, high = scoring.wilson_interval(3, 5)
    half_widths = (0.6 - low) / math.sqrt(2), (high - 0.6) / math.sqrt(2)
    assert summary["macro"]["interval"] == pytest.approx([0.6 - half_widths[0], 0.6 + half_widths[1]])


def test_macro_interval_covers_the_true_mean_about_95_times_in_100():
    rng, shares, covered = random.Random(1), (0.9, 0.5, 0.3), 0
    for _ in range(400):
        items = []
        for task, share in enumerate(shares):
            outcome = "".join("1" if rng.random() < share else "0" for _ in range(40))
            items += predictions(outcome, task=str(task), start=40 * task)
        low, high = scoring.summarize(items)["macro"]["interval"]
        covered += low <= sum(shares) / 3 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_summary_needs_predictions():
    with pytest.raises(ValueError, match="at least one prediction"):
        scoring.summarize([])


def test_comparison_counts_and_signs():
    first = predictions("1100", task="a") + predictions("10", task="b", start=4)
    second = predictions("1011", task="a") + predictions("00", task="b", start=4)
    result = scoring.compare(iter(first), iter(second))
    assert (result["n"], result["only_first"], result["only_second"]) == (6, 2, 2)
    assert result["tasks"]["a"]["difference"] == 0.25
    assert result["tasks"]["b"]["difference"] == -0.5
    assert result["micro"]["difference"] == 0
    assert result["macro"]["difference"] == -0.125


def test_bootstrap_interval_agrees_with_the_exact_distribution_of_the_resampled_difference():
    n, only_first, only_second = 60, 6, 15
    first = predictions("1" * only_first + "0" * only_second + "1" * (n - only_first - only_second))
    second = predictions("0" * only_first + "1" * only_second + "1" * (n - only_first - only_second))
    # The distribution of a sum of n draws from {-1, 0, +1}, by convolution.
    distribution = {0: 1.0}
    step = {-1: only_first / n, 0: 1 - (only_first + only_second) / n, 1: only_second / n}
    for _ in range(n):
        folded: dict[int, float] = {}
        for (value, p), (move, q) in itertools.product(distribution.items(), step.items()):
            folded[value + move] = folded.get(value + move, 0.0) + p * q
        distribution = folded

    def share_below(limit):
        return sum(p for value, p in distribution.items() if value < limit)

    result = scoring.compare(first, second, resamples=20_000, seed=3)
    for change in (result["micro"], result["macro"], result["tasks"]["t"]):
        assert change["difference"] == pytest.approx(9 / n)
        low, high = (round(limit * n) for limit in change["interval"])
        assert share_below(low) - 0.005 <= 0.025 <= share_below(low + 1) + 0.005
        assert share_below(high) - 0.005 <= 0.975 <= share_below(high + 1) + 0.005


def test_comparison_is_seeded_and_fast_for_ten_thousand_items():
    rng = random.Random(0)
    first, second = (predictions("".join(rng.choice("01") for _ in range(10_000))) for _ in range(2))
    result = scoring.compare(first, second)
    assert result == scoring.compare(first, second, seed=0)
    assert result["micro"]["interval"] != scoring.compare(first, second, seed=1)["micro"]["interval"]
    low, high = result["micro"]["interval"]
    # The normal approximation: the sum of n differences has the variance b + c - (c - b)^2 / n.
    b, c = result["only_first"], result["only_second"]
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(b + c - (c - b) ** 2 / 10_000) / 10_000, rel=0.1)


def test_comparison_of_equal_predictions():
    result = scoring.compare(predictions("101"), predictions("101"))
    assert result["micro"] == {"difference": 0, "interval": [0, 0]}
    assert result["mcnemar_p"] == 1


@pytest.mark.parametrize(
    "other",
    [
        predictions("10"),
        predictions("101", start=1),
        predictions("101", task="u"),
        predictions("1011"),
        predictions("101")[::-1],
        [],
    ],
)
def test_comparison_refuses_different_items(other):
    with pytest.raises(ValueError, match="must hold the same items"):
        scoring.compare(predictions("101"), other)


def test_comparison_refuses_an_item_given_twice():
    with pytest.raises(ValueError, match="must hold the same items"):
        scoring.compare(predictions("101"), predictions("101") + predictions("1"))


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (3, 3), (2, 9), (9, 2), (0, 12), (40, 60)])
def test_mcnemar_against_the_binomial_distribution(b, c):
    tail = sum(Fraction(math.comb(b + c, k), 2 ** (b + c)) for k in range(min(b, c) + 1))
    assert scoring.mcnemar_p(b, c) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)


def test_mcnemar_with_many_items():
    assert 0 < scoring.mcnemar_p(4000, 4400) < 2e-5


def test_table_shows_tasks_averages_and_intervals():
    items = predictions("1110", task="a") + predictions("0-", task="", start=4)
    text = scoring.format_table({"one": scoring.summarize(items), "two": scoring.summarize(items[:4])})
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    low, high = scoring.wilson_interval(3, 4)
    assert f"75.00 [{100 * low:.2f}, {100 * high:.2f}]" in rows["a"]
    assert rows["(none)"].endswith("-")
    assert "37.50" in rows["mean over tasks (macro)"]
    assert "16.67" in rows["could not be read"]


def test_comparison_is_shown_in_percentage_points():
    text = scoring.format_comparison(scoring.compare(predictions("1000"), predictions("1110")))
    assert "+50.00 [" in text
    assert "McNemar p = 0.5 (2 items right only in the second, 0 only in the first, of 4)" in text


def test_the_module_needs_the_standard_library_only():
    """Loaded from its file in an interpreter without site-packages."""
    path = Path(scoring.__file__)
    code = f"import runpy; runpy.run_path({str(path)!r})"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
