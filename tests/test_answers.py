"""Reading options and answers from rows and texts."""

import itertools
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lslora import answers

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
        ("true / false", ("true", "false")),
        ("New York/Paris", None),
        ("true", None),
        ("true/true", None),
        ("", None),
    ],
)
def test_options_are_read_from_the_end_of_the_instruction(ending, options):
    assert answers.options_of({"instruction": f"Is it so?\n\nAnswer format: {ending}"}) == options


def test_an_instruction_without_the_line_is_no_multiple_choice():
    assert answers.options_of({"instruction": "How many apples/pears?"}) is None


def test_option_completion_replaces_the_whole_word():
    assert answers.option_completion(row("answer2"), "answer4") == "the correct answer is answer4"
    phrased = row("true", output="Is it untrue? I say true.")
    assert answers.option_completion(phrased, "false") == "Is it untrue? I say false."
    assert answers.option_completion(phrased, "true") == phrased["output"]


@pytest.mark.parametrize("output", ["Of these, true fits, so it is true", "True. The answer is true"])
def test_an_answer_that_is_named_twice_would_be_read_off_in_every_option(output):
    asked = row("true", options=BOOL, output=output)
    with pytest.raises(ValueError, match="must name the answer 'true' once, got '" + re.escape(output)):
        answers.option_completion(asked, "false")
    with pytest.raises(ValueError, match="once"):
        answers.choose_scorer(asked, "likelihood")
    assert answers.choose_scorer(asked) == "generate"


def test_an_article_is_no_second_mention_of_an_option_of_one_letter():
    asked = row("A", options=tuple("ABCD"), output="the correct answer is A, a bird")
    assert answers.choose_scorer(asked) == "likelihood"
    assert answers.option_completion(asked, "B") == "the correct answer is B, a bird"


def test_option_completion_needs_the_answer_in_the_output():
    with pytest.raises(ValueError, match=r"must contain the answer 'true', got 'untrue'"):
        answers.option_completion(row("true", output="untrue"), "false")


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
        # however the lines are broken
        ("The correct\nanswer  is\n\n        answer3, not answer1", "answer3"),
        ("answer2 ###\nInstruction: answer1", "answer2"),
        ("answer2\nAnswer\u00a0format: answer1", "answer2"),
    ],
)
def test_extract_answer(text, expected):
    assert answers.extract_answer(text, FOUR) == expected


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
    assert answers.extract_answer(text, BOOL) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is B. A robin is a bird.", "B"),
        ("Answer: C\nExplanation: this is a reptile.", "C"),
        ("(B) a bird", "B"),
        ("B. A robin", "B"),
        ("**B**", "B"),
        ("b) a bird", "B"),
        ("b", "B"),
        ("The answer is: (d).", "D"),
        ("the correct answer is C, a reptile", "C"),
        ("The right option is D because a whale is a mammal.", "D"),
        ("A robin is a bird, so B", "B"),
        ("Answer format: A/B/C/D\nB", "B"),
        ("the answer is a bird", None),
        ("A, B, C or D", None),
    ],
)
def test_an_article_is_no_option(text, expected):
    assert answers.extract_answer(text, "ABCD") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes. There is no doubt about it.", "yes"),
        ("The answer is no. And yes, that is final.", "no"),
        ("No: it is false to say yes", "no"),
        ("Yes and no, but rather no", "no"),
    ],
)
def test_what_a_text_states_counts_before_what_it_names(text, expected):
    assert answers.extract_answer(text, ("yes", "no")) == expected


@pytest.mark.parametrize("options", [("-1", "0", "1"), ("$5", "5"), (".5", "5")])
def test_a_sign_is_part_of_an_option(options):
    for option in options:
        for text in (
            f"the correct answer is {option}",
            f"Answer: {option}.",
            f"{option}. That is all.",
            f"({option})",
        ):
            assert answers.extract_answer(text, options) == option


def test_an_answer_in_another_case_is_generated():
    assert answers.choose_scorer(row("yes", options=("yes", "no"), output="Yes.")) == "generate"
    assert answers.choose_scorer(row("yes", options=("yes", "no"), output="yes.")) == "likelihood"


def test_of_two_options_that_begin_alike_the_whole_one_counts():
    assert answers.extract_answer("a-b", ("a", "a-b")) == "a-b"
    assert answers.extract_answer("a", ("a", "a-b")) == "a"


PIECES = st.sampled_from(
    [*FOUR, "ANSWER1", "answer", "/", ", ", " or ", ":", "\n", "correct answer is ", ECHO, "_", "."]
)
TEXTS = st.text() | st.lists(PIECES).map("".join) | st.lists(PIECES | st.text(max_size=3)).map(" ".join)
WORDS = st.text(st.characters(exclude_categories=["Zs", "Cc"]), min_size=1, max_size=4)
OPTIONS = st.lists(WORDS, min_size=2, max_size=4, unique=True)


@given(text=TEXTS, options=st.just(FOUR) | st.just(BOOL) | OPTIONS)
def test_any_text_gives_none_or_an_option(text, options):
    answer = answers.extract_answer(text, options)
    assert answer is None or answer in options


@given(before=TEXTS, answer=st.sampled_from(FOUR), after=st.sampled_from(["", ECHO, LISTING, ECHO[:30], "\n" + ECHO]))
def test_a_final_statement_decides_whatever_came_before(before, answer, after):
    text = f"{before}\nthe correct answer is {answer}\n\n{after}"
    assert answers.extract_answer(text, FOUR) == answer


WHITESPACE = st.text(" \t\n\r\x0b\x0c\x85\u00a0\u2003\u2028\u3000", min_size=1, max_size=8)


@given(
    parts=st.lists(PIECES | st.sampled_from(["### Instruction", "the answer is", "12", "-3.5", "or", "true"])),
    spaces=st.lists(WHITESPACE, min_size=1),
    answer=st.sampled_from(["answer1", "7", "C"]),
)
def test_whitespace_does_not_matter(parts, spaces, answer):
    """Every run of whitespace in a text changed into another one."""
    plain = re.split(r"\s+", " ".join(parts))
    text = "".join(word + space for word, space in zip(plain, itertools.cycle(spaces), strict=False))
    assert answers.extract_answer(text, FOUR) == answers.extract_answer(" ".join(plain), FOUR)
    assert answers.extract_number(text) == answers.extract_number(" ".join(plain))
    asked = row(answer, options=FOUR if answer in FOUR else None)
    assert answers.grade(asked, text) == answers.grade(asked, " ".join(plain))


@given(text=TEXTS, answer=st.text(min_size=1) | st.text("0123456789,.-\u2212", min_size=1), ending=st.text())
def test_any_text_can_be_graded(text, answer, ending):
    asked = {"instruction": f"Choose. Answer format: {ending}", "output": text, "answer": answer}
    prediction, right = answers.grade(asked, text)
    assert isinstance(right, bool) and (prediction is not None or not right)
    problem = answers.answer_problem(asked)
    assert problem is None or "must" in problem


def test_rows_that_contradict_themselves():
    assert answers.answer_problem(row("answer1")) is None
    assert answers.answer_problem(row("answer1", output="Answer1.")) is None
    assert answers.answer_problem(row("anything", options=None)) is None
    assert answers.answer_problem({"instruction": "Answer format: a/b", "output": "c"}) is None
    assert "must be one of answer1/answer2/answer3/answer4, got 'x'" in answers.answer_problem(row("x"))
    assert "give the answer 'answer1', got 'answer2'" in answers.answer_problem(row("answer1", output="answer2"))
    assert "give the answer 'answer1', got None" in answers.answer_problem(row("answer1", output="Venus"))


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
    assert answers.extract_number(text) == number


@given(st.text() | st.text("0123456789.,- $"))
def test_any_text_gives_none_or_a_number(text):
    number = answers.extract_number(text)
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
        ("C", "C", ("C", True)),
        ("C", "C++", ("C++", False)),
        ("C++", "C++.", ("C++", True)),
        ("Paris", '**"paris"**.', ("paris", True)),
        ("New York", "New York\n### Instruction:\nWhere?", ("New York", True)),
        ("Paris", "It is Paris.", ("It is Paris.", False)),
        ("Paris", " \n", (None, False)),
        ("12345678901234567890", "12345678901234567891", ("12345678901234567891", False)),
        ("\u22127", "The answer is -7.", ("-7", True)),
        ("0.5", "0.501", ("0.501", True)),
        ("0.5", "0.5011", ("0.5011", False)),
        ("1/3", "The answer is 1/3.", ("1/3", True)),
        ("New York", "The answer is new  york.", ("new york", True)),
        ("New York", "The answer is New Orleans.", ("New", False)),
        ("Paris", "The answer is Parisian.", ("Parisian", False)),
        ("25%", "The answer is 25%.", ("25%", True)),
        ("$18", "The answer is **$18**.", ("$18", True)),
        ("-1/2", "The answer is -1/2.", ("-1/2", True)),
        ("1/2", "The answer is !", (None, False)),
        ("北京", "北京。", ("北京", True)),
        ("東京", "「東京」", ("東京", True)),
        ("Paris", "«Paris»…", ("Paris", True)),
        ("Sí", "¡Sí!", ("Sí", True)),
        ("¿Qué?", "¿Qué?", ("¿Qué?", True)),
        ("C", "C±", ("C±", False)),  # a sign that is no punctuation, as + is none
        ("कम", "The answer is कमी.", ("कमी", False)),
    ],
)
def test_grade_without_options(answer, text, graded):
    assert answers.grade(row(answer, options=None), text) == graded


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("सही उत्तर ख है, क्योंकि यह पृथ्वी की धुरी है।", "ख"),  # "की" is क with a vowel sign
        ("ख. पृथ्वी की धुरी", "ख"),
        ("की", None),
        ("ीक", None),
        ("The correct answer is ख.", "ख"),
    ],
)
def test_a_letter_with_a_mark_is_another_letter(text, expected):
    assert answers.extract_answer(text, tuple("कखगघ")) == expected


def test_grade_with_options():
    assert answers.grade(row("answer2"), "Answer2") == ("answer2", True)
    assert answers.grade(row("answer2"), "answer1") == ("answer1", False)
    assert answers.grade(row("answer2"), "Venus") == (None, False)


def test_choose_scorer():
    chosen = {
        (scorer, bool(options)): answers.choose_scorer(row("answer1", options=options), scorer)
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
        answers.choose_scorer(bad, scorer)
