"""From generated text to an answer, from answers to accuracies with intervals; the standard library only.

A prediction is a dict with at least `index` (position of its row), `task`, `answer` (the right one), `prediction`
(None where none could be read from the text) and `correct` (bool).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

Prediction = dict[str, Any]
Summary = dict[str, Any]

SCORERS = ("auto", "likelihood", "generate")
Z_95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution
MICRO, MACRO = "all items (micro)", "mean over tasks (macro)"
NUMBER_TOLERANCE = 1e-3  # as in evaluate.py of LLM-Adapters

_ANSWER_FORMAT = re.compile(r"answer format:[ \t]*([^\s/]+(?:/[^\s/]+)+)\s*\Z", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-\u2212])?"  # a minus, unless it subtracts
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)
_STATED_WORD = re.compile(r"answer is\W{0,5}(\w+(?:[/:-]\w+)*)", re.IGNORECASE)


def options_of(row: Mapping[str, str]) -> tuple[str, ...] | None:
    """The options among which a row asks to choose, read from `Answer format: a/b/c` at the end of its instruction.

    Args:
        row: A row with an `instruction`.

    Returns:
        The options in the order named, at least two; None where the instruction does not end so: no multiple choice.
    """
    found = _ANSWER_FORMAT.search(row["instruction"])
    options = tuple(dict.fromkeys(found[1].split("/"))) if found else ()
    return options if len(options) > 1 else None


def option_completion(row: Mapping[str, str], option: str) -> str:
    """The completion that gives `option` as the answer: the row's `output` with the last `answer` in it replaced.

    Args:
        row: A row whose `output` contains its `answer` as a word of its own ("the correct answer is answer2").
        option: The answer to give instead.

    Returns:
        The text, equal to `row["output"]` for `option == row["answer"]`.

    Raises:
        ValueError: `output` does not contain `answer`.
    """
    places = list(re.finditer(_word(row["answer"]), row["output"]))
    if not places:
        raise ValueError(f"the output must contain the answer {row['answer']!r}, got {row['output']!r}")
    return row["output"][: places[-1].start()] + option + row["output"][places[-1].end() :]


def choose_scorer(row: Mapping[str, str], scorer: str = "auto") -> str:
    """Decide how a row is scored, and check that it can be.

    Args:
        row: A row with `instruction`, `output` and `answer`.
        scorer: `"likelihood"` (needs options), `"generate"`, or `"auto"`: the former for rows with options, the latter
            for all others.

    Returns:
        `"likelihood"` or `"generate"`.

    Raises:
        ValueError: `scorer` is none of the three, or the row lacks what the scorer needs: an answer; with options, an
            answer that is one of them; for the likelihood, options and an output that contains the answer.
    """
    if scorer not in SCORERS:
        raise ValueError(f"scorer must be one of {', '.join(SCORERS)}, got {scorer!r}")
    options = options_of(row)
    if not row["answer"]:
        raise ValueError("a row to be scored must have an answer, got an empty one")
    if options and row["answer"] not in options:
        raise ValueError(f"the answer must be one of {'/'.join(options)}, got {row['answer']!r}")
    if scorer == "generate" or (scorer == "auto" and not options):
        return "generate"
    if not options:
        raise ValueError("the likelihood needs an instruction that ends in 'Answer format: a/b/...', got one without")
    option_completion(row, row["answer"])
    return "likelihood"


def extract_answer(text: str, options: Sequence[str]) -> str | None:
    """Read which of the options a generated text gives as its answer.

    The last "correct answer is X" decides, else the last option named; whole words only, in upper or lower case.
    No answer are: lists of different options ("answer1/answer2", "true or false"), what follows "Answer format:",
    options that head their own text ("Answer1: ... Answer2: ..."), and everything from the next "### Instruction" on.

    Args:
        text: What the model wrote after the prompt.
        options: The options as `options_of` returns them.

    Returns:
        One of `options`, or None where the text names none.
    """
    options = sorted(options, key=len, reverse=True)  # of two that begin alike, the longer one is tried first
    word = _word(*options)

    def named(part: str) -> list[str]:
        """All options named in a part of the text, in order."""
        return [_same_option(match[0], options) for match in re.finditer(word, part, re.IGNORECASE)]

    def blank_list(match: re.Match[str]) -> str:
        return " _ " if len(set(named(match[0]))) > 1 else match[0]

    separator = r"\s*(?:[/|]|,(?:\s*(?:or|and)\b)?|\b(?:or|and)\b)\s*"
    text = _before_next_question(text)
    text = re.sub(rf"answer format:\s*{word}(?:\s*/\s*{word})*", " _ ", text, flags=re.IGNORECASE)
    text = re.sub(rf"{word}(?:{separator}{word})+", blank_list, text, flags=re.IGNORECASE)
    heads = " ".join(re.findall(rf"{word}\s*:", text, re.IGNORECASE))
    if len(set(named(heads))) > 1:
        text = re.sub(rf"{word}\s*:", " _ ", text, flags=re.IGNORECASE)
    stated = re.findall(rf"correct answer is\W{{0,5}}{word}", text, re.IGNORECASE)
    answers = named(stated[-1] if stated else text)
    return answers[-1] if answers else None


def extract_number(text: str) -> str | None:
    """Read the last number of a generated text, up to the next "### Instruction".

    Args:
        text: What the model wrote after the prompt.

    Returns:
        The number without thousands commas ("22,902." gives "22902"), or None where the text holds none.
    """
    numbers = _NUMBER.findall(_before_next_question(text))
    return numbers[-1].replace(",", "").replace("\u2212", "-") if numbers else None


def grade(row: Mapping[str, str], text: str) -> tuple[str | None, bool]:
    """Read the answer from a generated text and compare it with the row's.

    Rows with options: see `extract_answer`. Rows whose answer is a number: the last number in the text, right when it
    differs by at most 0.001. Others: the word after the last "answer is", whatever its case.

    Args:
        row: A row with `instruction` and `answer`.
        text: What the model wrote after the prompt.

    Returns:
        The answer read (None where there is none) and whether it is right.
    """
    answer = row["answer"]
    options = options_of(row)
    if options:
        prediction = extract_answer(text, options)
        return prediction, prediction == answer
    if _NUMBER.fullmatch(answer):
        prediction = extract_number(text)
        right = prediction is not None and abs(float(prediction) - _as_number(answer)) <= NUMBER_TOLERANCE
        return prediction, right
    stated = _STATED_WORD.findall(_before_next_question(text))
    return (stated[-1], stated[-1].casefold() == answer.casefold()) if stated else (None, False)


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


def summarize(predictions: Sequence[Prediction]) -> Summary:
    """Accuracies of a set of predictions: per task, over all items (micro) and over the tasks' accuracies (macro).

    The macro average's interval combines the tasks' Wilson limits `l_t`, `u_t` (Zou and Donner 2008, Statistics in
    Medicine 27): `mean(p) - sqrt(Σ (p_t - l_t)²)/T` to `mean(p) + sqrt(Σ (u_t - p_t)²)/T`.

    Args:
        predictions: At least one.

    Returns:
        `{"tasks": {task: figures}, "micro": figures, "macro": figures}`; figures are `n`, `accuracy`, `interval`
        (95 %) and `unparsed` (share without a readable answer). `n` of the macro average counts tasks.

    Raises:
        ValueError: there are no predictions.
    """
    if not predictions:
        raise ValueError("must hold: at least one prediction, got none")
    tasks = {task: _figures(items) for task, items in _by_task(predictions).items()}
    mean = sum(figures["accuracy"] for figures in tasks.values()) / len(tasks)
    below = math.hypot(*(figures["accuracy"] - figures["interval"][0] for figures in tasks.values())) / len(tasks)
    above = math.hypot(*(figures["interval"][1] - figures["accuracy"] for figures in tasks.values())) / len(tasks)
    unparsed = sum(figures["unparsed"] for figures in tasks.values()) / len(tasks)
    macro = {"n": len(tasks), "accuracy": mean, "interval": [mean - below, mean + above], "unparsed": unparsed}
    return {"tasks": tasks, "micro": _figures(predictions), "macro": macro}


def compare(
    first: Sequence[Prediction], second: Sequence[Prediction], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Compare two sets of predictions on the same items: accuracy of `second` minus accuracy of `first`.

    The intervals are percentiles of a paired bootstrap over the items of each task. Only the number of items that
    exactly one side gets right matters, so these numbers are drawn (multinomially), not the items. Where the two
    sides are right on the very same items, the interval has no width. The p-value is McNemar's exact one:
    `2 · P(X <= min(b, c))`, `X ~ Bin(b + c, 1/2)`, for the `b` and `c` items that only one side gets right.

    Args:
        first: The one compared with (such as the base model).
        second: The other; the same items in any order.
        resamples: Number of bootstrap draws.
        seed: Seed of the draws.

    Returns:
        `{"n", "only_first", "only_second", "mcnemar_p", "tasks": {task: change}, "micro": change, "macro": change}`
        with `change = {"difference", "interval"}`.

    Raises:
        ValueError: the two are empty or hold different items (index, task or answer).
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


def _word(*words: str) -> str:
    """A pattern for any of the words, not inside a longer word."""
    return rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)"


def _same_option(text: str, options: Sequence[str]) -> str:
    """The option that a match spells; by matching again, as some characters match without sharing a lower case."""
    return next(option for option in options if re.fullmatch(re.escape(option), text, re.IGNORECASE))


def _before_next_question(text: str) -> str:
    """What belongs to the question asked: a model that goes on may write the next one and answer it too."""
    return text.split("### Instruction", 1)[0]


def _as_number(text: str) -> float:
    return float(text.replace(",", "").replace("\u2212", "-"))


def _by_task(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    tasks: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        tasks.setdefault(prediction["task"], []).append(prediction)
    return tasks


def _figures(predictions: Sequence[Prediction]) -> dict[str, Any]:
    n, correct = len(predictions), sum(prediction["correct"] for prediction in predictions)
    unparsed = sum(prediction["prediction"] is None for prediction in predictions)
    return {"n": n, "accuracy": correct / n, "interval": [*wilson_interval(correct, n)], "unparsed": unparsed / n}


def _percentages(figures: Mapping[str, Any]) -> str:
    low, high = figures["interval"]
    return f"{100 * figures['accuracy']:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def _paired_counts(first: Sequence[Prediction], second: Sequence[Prediction]) -> dict[str, tuple[int, int, int]]:
    """Per task: items, items that only the first gets right, items that only the second gets right."""
    partner = {_identity(prediction): prediction for prediction in second}
    unmatched = partner.keys() ^ {_identity(prediction) for prediction in first}
    if unmatched or len(first) != len(second) or not first:
        shown = ", ".join(f"index {index} (task {task!r}, answer {answer!r})" for index, task, answer in unmatched)
        raise ValueError(
            f"both must hold the same items, at least one: got {len(first)} and {len(second)}, "
            f"{len(unmatched)} of them on one side only" + (f", such as {shown.split(', index')[0]}" if shown else "")
        )
    counts = {}
    for task, items in _by_task(first).items():
        pairs = [(item["correct"], partner[_identity(item)]["correct"]) for item in items]
        counts[task] = (len(pairs), sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))
    return counts


def _identity(prediction: Prediction) -> tuple[Any, Any, Any]:
    return prediction["index"], prediction["task"], prediction["answer"]


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
