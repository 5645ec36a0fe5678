"""Reading answers from text, and the statistics, against counts and distributions worked out independently."""

import itertools
import math
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lslora import scoring

BOOL = ("true", "false")
FOUR = ("answer1", "answer2", "answer3", "answer4")
ECHO = "Answer format: answer1/answer2/answer3/answer4"
LISTING = "Answer1: the Sun Answer2: Venus Answer3: the moon Answer4: the Earth"


def row(answer, *, options=FOUR, output=None, task="arc"):
    instruction = "Choose.\n\nAnswer format: " + "/".join(options) if options else "How many?"
    return {
        "instruction": instruction,
        "input": "",
        "output": f"the correct answer is {answer}" if output is None else output,
        "answer": answer,
        "task": task,
    }


@pytest.mark.parametrize(
    ("ending", "options"),
    [
        ("true/false", ("true", "false")),
        ("answer1/answer2/answer3", ("answer1", "answer2", "answer3")),
        ("solution1/solution2 \n", ("solution1", "solution2")),
        ("ending1/ending2/ending3/ending4", ("ending1", "ending2", "ending3", "ending4")),
        ("option1/option2\n\nThink well.", None),
        ("a number", None),
        ("true", None),
        ("true/true", None),
        ("", None),
    ],
)
def test_options_are_read_from_the_end_of_the_instruction(ending, options):
    assert scoring.options_of({"instruction": f"Is it so?\n\nAnswer format: {ending}"}) == options


def test_an_instruction_without_the_line_is_no_multiple_choice():
    assert scoring.options_of({"instruction": "How many apples/pears?"}) is None


def test_option_completion_replaces_the_last_whole_word():
    assert scoring.option_completion(row("answer2"), "answer4") == "the correct answer is answer4"
    phrased = row("true", output="Is untrue true? I say true.")
    assert scoring.option_completion(phrased, "false") == "Is untrue true? I say false."
    assert scoring.option_completion(phrased, "true") == phrased["output"]


def test_option_completion_needs_the_answer_in_the_output():
    with pytest.raises(ValueError, match=r"must contain the answer 'true', got 'untrue'"):
        scoring.option_completion(row("true", output="untrue"), "false")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the correct answer is answer2", "answer2"),
        ("The Correct Answer Is ANSWER3.", "answer3"),
        ("the correct answer is: **answer3**", "answer3"),
        ("answer4", "answer4"),
        ("the correct answer is answer2\n" * 5 + "the correct answer is answer", "answer2"),
        ("answer1 is tempting, but answer3", "answer3"),
        ("the correct answer is answer2, since answer4 is too far away", "answer2"),
        ("the correct answer is answer1. No: the correct answer is answer3", "answer3"),
        # the options are repeated before or after the answer, whole or cut off
        (f"{ECHO}\nthe correct answer is answer3", "answer3"),
        (f"{ECHO}\nanswer3", "answer3"),
        (f"answer2\n\n{ECHO}", "answer2"),
        ("answer2\n\nAnswer format: answer1/answer2/answ", "answer2"),
        ("answer2\n\nAnswer format: answer1", "answer2"),
        ("answer2\nanswer1/answer2/answer3/answer4", "answer2"),
        ("answer2\nanswer1 / answer2 / answer3 / answer4", "answer2"),
        ("answer2, out of answer1, answer3, or answer4", "answer2"),
        ("answer1, answer2, answer3 or answer4", None),
        ("answer2. The options were answer1, answer2, answer3, or answer4.", "answer2"),
        ("the correct answer is answer1/answer2/answer3/answer4", None),
        ("the correct answer is answer1/answer2/answer3/answer4\nthe correct answer is answer4", "answer4"),
        (f"{LISTING}\n\n{ECHO}\n\nanswer2", "answer2"),
        (f"answer2\n\n{LISTING}\n\n{ECHO}", "answer2"),
        ("the correct answer is answer2: Venus", "answer2"),
        ("answer2: Venus", "answer2"),
        # the model goes on with a question of its own
        ("answer2\n\n### Instruction:\nChoose.\n\n### Response:\nthe correct answer is answer1", "answer2"),
        # nothing to read
        ("", None),
        (ECHO, None),
        ("the correct answer is answer5", None),
        ("the correct answer is answer22", None),
        ("myanswer2", None),
        ("Venus", None),
    ],
)
def test_extract_answer(text, expected):
    assert scoring.extract_answer(text, FOUR) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("true/false: false", "false"),
        ("false\n\nAnswer format: true/false", "false"),
        ("It is untrue to call it true, falsehood or not", "true"),
        ("true or false? true", "true"),
        ("true, true, true", "true"),
        ("True.", "true"),
        ("the correct answer is fal\u017fe", "false"),  # a long s, which matches s in any case
    ],
)
def test_extract_true_or_false(text, expected):
    assert scoring.extract_answer(text, BOOL) == expected


def test_of_two_options_that_begin_alike_the_whole_one_counts():
    assert scoring.extract_answer("a-b", ("a", "a-b")) == "a-b"
    assert scoring.extract_answer("a", ("a", "a-b")) == "a"


PIECES = st.sampled_from(
    [*FOUR, "ANSWER1", "answer", "/", ", ", " or ", ":", "\n", "correct answer is ", ECHO, "_", "."]
)
TEXTS = st.text() | st.lists(PIECES).map("".join) | st.lists(PIECES | st.text(max_size=3)).map(" ".join)
WORDS = st.text(st.characters(exclude_categories=["Zs", "Cc"]), min_size=1, max_size=4)
OPTIONS = st.lists(WORDS, min_size=2, max_size=4, unique=True)


@given(text=TEXTS, options=st.just(FOUR) | st.just(BOOL) | OPTIONS)
def test_any_text_gives_none_or_an_option(text, options):
    answer = scoring.extract_answer(text, options)
    assert answer is None or answer in options


@given(before=TEXTS, answer=st.sampled_from(FOUR), after=st.sampled_from(["", ECHO, LISTING, ECHO[:30], "\n" + ECHO]))
def test_a_final_statement_decides_whatever_came_before(before, answer, after):
    text = f"{before}\nthe correct answer is {answer}\n\n{after}"
    assert scoring.extract_answer(text, FOUR) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She needs 12 - 11 = 1 more cup. The answer is 1.", "1"),
        ("157 * 146 = 22,902 points. The answer is 22,902.", "22902"),
        ("costs $1,234,567.89", "1234567.89"),
        ("between 3 and -4.50", "-4.50"),
        ("between 3 and \u22124", "-4"),
        ("10-3", "3"),
        ("1, 2", "2"),
        ("1,2345", "2345"),
        ("half is .5", ".5"),
        ("7\n\n### Instruction:\nAnd 8?", "7"),
        ("none", None),
        ("", None),
    ],
)
def test_extract_number(text, number):
    assert scoring.extract_number(text) == number


@given(st.text() | st.text("0123456789.,- $"))
def test_any_text_gives_none_or_a_number(text):
    number = scoring.extract_number(text)
    assert number is None or math.isfinite(float(number))


@pytest.mark.parametrize(
    ("answer", "text", "graded"),
    [
        ("1.0", "The answer is 1.", ("1", True)),
        ("22902", "The answer is 22,902.", ("22902", True)),
        ("1,000", "1000.0", ("1000.0", True)),
        ("0.3333333333333333", "0.333", ("0.333", True)),
        ("0.3333333333333333", "0.33", ("0.33", False)),
        ("12.0", "13", ("13", False)),
        ("12.0", "a dozen", (None, False)),
        ("C", "A car ... so a rate of 1. The answer is (C).", ("C", True)),
        ("C", "the answer is b", ("b", False)),
        ("C", "C", (None, False)),
        ("1/3", "The answer is 1/3.", ("1/3", True)),
    ],
)
def test_grade_without_options(answer, text, graded):
    assert scoring.grade(row(answer, options=None), text) == graded


def test_grade_with_options():
    assert scoring.grade(row("answer2"), "Answer2") == ("answer2", True)
    assert scoring.grade(row("answer2"), "answer1") == ("answer1", False)
    assert scoring.grade(row("answer2"), "Venus") == (None, False)


def test_choose_scorer():
    chosen = {
        (scorer, bool(options)): scoring.choose_scorer(row("answer1", options=options), scorer)
        for scorer, options in [("auto", FOUR), ("auto", None), ("generate", FOUR), ("likelihood", FOUR)]
    }
    assert chosen == {
        ("auto", True): "likelihood",
        ("auto", False): "generate",
        ("generate", True): "generate",
        ("likelihood", True): "likelihood",
    }


@pytest.mark.parametrize(
    ("bad", "scorer", "message"),
    [
        (row("answer1"), "logits", "scorer must be one of auto, likelihood, generate, got 'logits'"),
        (row("", output="x"), "auto", "must have an answer"),
        (row("answer5"), "generate", "must be one of answer1/answer2/answer3/answer4, got 'answer5'"),
        (row("7", options=None), "likelihood", "needs an instruction that ends in"),
        (row("answer1", output="Venus"), "auto", "must contain the answer"),
    ],
)
def test_choose_scorer_refuses_rows_it_cannot_score(bad, scorer, message):
    with pytest.raises(ValueError, match=message):
        scoring.choose_scorer(bad, scorer)


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
    result = scoring.compare(first, second[::-1])
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
    [predictions("10"), predictions("101", start=1), predictions("101", task="u"), predictions("1011"), []],
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
