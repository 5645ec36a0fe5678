"""From predictions to accuracies with intervals and paired differences; the standard library only.

A prediction is a dict with at least `index` (position of its row), `task`, `answer` (the right one), `prediction`
(None where none could be read from the text) and `correct` (bool).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

Prediction = dict[str, Any]
Summary = dict[str, Any]

Z_95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution
MICRO, MACRO = "all items (micro)", "mean over tasks (macro)"


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of an accuracy.

    `(p + z²/2n ± z · sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n)` with `p = correct/n`, `n = total`, `z = 1.96`.

    Args:
        correct: Number of right answers, from 0 to `total`.
        total: Number of answers, at least 1.

    Returns:
        The lower and the upper limit, both in [0, 1].

    Raises:
        ValueError: the counts are out of range.
    """
    if not (total >= 1 and 0 <= correct <= total):
        raise ValueError(f"must hold: 0 <= correct <= total and total >= 1, got correct={correct}, total={total}")
    share, spread = correct / total, Z_95**2 / total
    middle = share + spread / 2
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4)
    return (middle - half) / (1 + spread), min(1.0, (middle + half) / (1 + spread))  # rounding may exceed 1


def summarize(predictions: Iterable[Prediction]) -> Summary:
    """Accuracies of a set of predictions: per task, over all items (micro) and over the tasks' accuracies (macro).

    The macro average's interval combines the tasks' Wilson limits `l_t`, `u_t` (Zou and Donner 2008, Statistics in
    Medicine 27): `mean(p) - sqrt(Σ (p_t - l_t)²)/T` to `mean(p) + sqrt(Σ (u_t - p_t)²)/T`.

    Args:
        predictions: At least one; gone through once.

    Returns:
        `{"tasks": {task: figures}, "micro": figures, "macro": figures}`; figures are `n`, `accuracy`, `interval`
        (95 %) and `unparsed` (share without a readable answer). `n` of the macro average counts tasks.

    Raises:
        ValueError: there are no predictions.
    """
    counts: dict[str, list[int]] = {}  # per task: items, right ones, unreadable ones
    for prediction in predictions:
        _add(counts, prediction["task"], 1, prediction["correct"], prediction["prediction"] is None)
    if not counts:
        raise ValueError("must hold: at least one prediction, got none")
    tasks = {task: _figures(*count) for task, count in counts.items()}
    mean = sum(figures["accuracy"] for figures in tasks.values()) / len(tasks)
    below = math.hypot(*(figures["accuracy"] - figures["interval"][0] for figures in tasks.values())) / len(tasks)
    above = math.hypot(*(figures["interval"][1] - figures["accuracy"] for figures in tasks.values())) / len(tasks)
    unparsed = sum(figures["unparsed"] for figures in tasks.values()) / len(tasks)
    macro = {"n": len(tasks), "accuracy": mean, "interval": [mean - below, mean + above], "unparsed": unparsed}
    return {"tasks": tasks, "micro": _figures(*map(sum, zip(*counts.values(), strict=True))), "macro": macro}


def compare(
    first: Iterable[Prediction], second: Iterable[Prediction], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Compare two sets of predictions on the same items: accuracy of `second` minus accuracy of `first`.

    The intervals are percentiles of a paired bootstrap over the items of each task. Only the number of items that
    exactly one side gets right matters, so these numbers are drawn (multinomially), not the items. Where the two
    sides are right on the very same items, the interval has no width. The p-value is McNemar's exact one:
    `2 · P(X <= min(b, c))`, `X ~ Bin(b + c, 1/2)`, for the `b` and `c` items that only one side gets right.

    Args:
        first: The one compared with (such as the base model).
        second: The other; the same items in the same order. Both are gone through once.
        resamples: Number of bootstrap draws.
        seed: Seed of the draws.

    Returns:
        `{"n", "only_first", "only_second", "mcnemar_p", "tasks": {task: change}, "micro": change, "macro": change}`
        with `change = {"difference", "interval"}`.

    Raises:
        ValueError: the two are empty or hold different items (index, task or answer), or in another order.
    """
    counts = _paired_counts(first, second)
    total = sum(n for n, _, _ in counts.values())
    only_first = sum(b for _, b, _ in counts.values())
    only_second = sum(c for _, _, c in counts.values())
    rng = random.Random(seed)
    drawn = {task: [_resampled_change(rng, *count) for _ in range(resamples)] for task, count in counts.items()}
    shares = {task: [change / counts[task][0] for change in changes] for task, changes in drawn.items()}
    means = {task: (c - b) / n for task, (n, b, c) in counts.items()}
    return {
        "n": total,
        "only_first": only_first,
        "only_second": only_second,
        "mcnemar_p": mcnemar_p(only_first, only_second),
        "tasks": {task: _change(mean, shares[task]) for task, mean in means.items()},
        "micro": _change(
            (only_second - only_first) / total,
            [sum(changes) / total for changes in zip(*drawn.values(), strict=True)],
        ),
        "macro": _change(
            sum(means.values()) / len(means),
            [sum(changes) / len(means) for changes in zip(*shares.values(), strict=True)],
        ),
    }


def mcnemar_p(only_first: int, only_second: int) -> float:
    """McNemar's exact two-sided p-value: `min(1, 2 · Σ_{k <= min(b, c)} C(b + c, k) / 2^(b + c))`.

    Args:
        only_first: `b`, items that only the first side gets right.
        only_second: `c`, items that only the second side gets right.

    Returns:
        The p-value, 1 where both are 0.
    """
    total = only_first + only_second
    term = tail = 1
    for k in range(min(only_first, only_second)):
        term = term * (total - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**total)


def format_table(summaries: Mapping[str, Summary]) -> str:
    """Lay out summaries of the same tasks as a plain text table, one column each.

    Args:
        summaries: Column heading to summary, as `summarize` returns it.

    Returns:
        Lines of text without a line break at the end; accuracies in per cent with their 95 % interval.
    """
    tasks = list(dict.fromkeys(task for summary in summaries.values() for task in summary["tasks"]))
    lines = [["task", "n", *summaries]]
    for task in tasks:
        figures = [summary["tasks"].get(task) for summary in summaries.values()]
        n = next(entry["n"] for entry in figures if entry)
        lines.append([task or "(none)", str(n), *(_percentages(entry) if entry else "-" for entry in figures)])
    for average, name in (("micro", MICRO), ("macro", MACRO)):
        entries = [summary[average] for summary in summaries.values()]
        lines.append([name, str(entries[0]["n"]), *map(_percentages, entries)])
    unparsed = (f"{100 * summary['micro']['unparsed']:.2f}" for summary in summaries.values())
    lines.append(["could not be read", "", *unparsed])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """Lay out what `compare` returns as lines of text: differences in percentage points, then McNemar's p-value.

    Args:
        comparison: As `compare` returns it.

    Returns:
        Lines of text without a line break at the end.
    """
    changes = [(task or "(none)", change) for task, change in comparison["tasks"].items()]
    changes += [(MICRO, comparison["micro"]), (MACRO, comparison["macro"])]
    width = max(len(name) for name, _ in changes)
    lines = [
        f"{name.ljust(width)}  {100 * change['difference']:+.2f} "
        f"[{100 * change['interval'][0]:+.2f}, {100 * change['interval'][1]:+.2f}]"
        for name, change in changes
    ]
    only_first, only_second = comparison["only_first"], comparison["only_second"]
    lines.append(
        f"McNemar p = {comparison['mcnemar_p']:.4g} "
        f"({only_second} items right only in the second, {only_first} only in the first, of {comparison['n']})"
    )
    return "\n".join(lines)


def _add(counts: dict[str, list[int]], task: str, *numbers: int) -> None:
    """Add to the numbers of a task."""
    counts[task] = [sum(pair) for pair in zip(counts.get(task, [0] * len(numbers)), numbers, strict=True)]


def _figures(n: int, correct: int, unparsed: int) -> dict[str, Any]:
    return {"n": n, "accuracy": correct / n, "interval": [*wilson_interval(correct, n)], "unparsed": unparsed / n}


def _percentages(figures: Mapping[str, Any]) -> str:
    low, high = figures["interval"]
    return f"{100 * figures['accuracy']:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def _paired_counts(first: Iterable[Prediction], second: Iterable[Prediction]) -> dict[str, list[int]]:
    """Per task: items, items that only the first gets right, items that only the second gets right."""
    counts: dict[str, list[int]] = {}
    for number, (one, other) in enumerate(zip_longest(first, second), start=1):
        if _identity(one) != _identity(other):
            raise ValueError(
                "both must hold the same items in the same order, "
                f"but item {number} is {_identity(one)} in the first and {_identity(other)} in the second"
            )
        a, b = one["correct"], other["correct"]
        _add(counts, one["task"], 1, a and not b, b and not a)
    if not counts:
        raise ValueError("both must hold the same items, at least one, got none")
    return counts


def _identity(prediction: Prediction | None) -> str:
    if prediction is None:
        return "missing"
    return f"index {prediction['index']} (task {prediction['task']!r}, answer {prediction['answer']!r})"


def _change(difference: float, drawn: list[float]) -> dict[str, Any]:
    """A difference with the 2.5 % and the 97.5 % percentile of its bootstrap draws."""
    ordered = sorted(drawn)
    last = len(ordered) - 1
    return {"difference": difference, "interval": [ordered[round(0.025 * last)], ordered[round(0.975 * last)]]}


def _resampled_change(rng: random.Random, n: int, only_first: int, only_second: int) -> int:
    """One bootstrap draw of `only_second - only_first` among `n` items."""
    discordant = only_first + only_second
    if discordant == 0:
        return 0
    drawn = _binomial(rng, n, discordant / n)
    return 2 * _binomial(rng, drawn, only_second / discordant) - drawn


def _binomial(rng: random.Random, n: int, probability: float) -> int:
    """A draw from Bin(n, probability), the probability being rounded to 32 binary digits.

    All n coins are tossed at once, as the bits of an integer: going through the digits of the probability from the
    last to the first, OR with fair bits turns the chance p of a set bit into (1 + p)/2, AND turns it into p/2.
    """
    if probability >= 1:
        return n
    digits, coins = int(probability * 2**32), 0
    for place in range(32):
        fair = rng.getrandbits(n)
        coins = coins | fair if digits >> place & 1 else coins & fair
    return coins.bit_count()
