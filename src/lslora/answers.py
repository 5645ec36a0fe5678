"""A row's options, the scorer that suits it, and from generated text to an answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal

SCORERS = ("auto", "likelihood", "generate")
NUMBER_TOLERANCE = Decimal("0.001")  # as in evaluate.py of LLM-Adapters

_ANSWER_FORMAT = re.compile(r"answer format:[ \t]*([^\s/]+(?:[ \t]*/[ \t]*[^\s/]+)+)\s*\Z", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-\u2212])?"  # a minus, unless it subtracts
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)
_STATED = re.compile(r"answer is(\W{0,5})((?:\w+(?:[/:-]\w+)*)?)", re.IGNORECASE)


def _of_kind(kind: str) -> list[str]:
    """The characters of a kind of Unicode's that ASCII lacks, but for rare planes: `M` marks, `P` punctuation."""
    return [char for char in map(chr, range(0x80, 0x20000)) if unicodedata.category(char)[0] == kind]


# What may stand around an answer that is all a text says.
_AROUND = re.compile(rf"[\s.,:;!?*\"'`()\[\]{re.escape(''.join(_of_kind('P')))}]*")
# Marks, as the vowel signs of Hindi are, make a letter another one, and \w leaves them out. So a text is searched with
# letters in their places, which hardly any text has: those of CJK's Extension B.
_LETTERS = {ord(mark): chr(0x20000 + place) for place, mark in enumerate(_of_kind("M"))}


def options_of(row: Mapping[str, str]) -> tuple[str, ...] | None:
    """The options among which a row asks to choose, read from `Answer format: a/b/c` at the end of its instruction.

    An option is one word.

    Args:
        row: A row with an `instruction`.

    Returns:
        The options in the order named, at least two; None where the instruction does not end so: no multiple choice.
    """
    found = _ANSWER_FORMAT.search(row["instruction"])
    options = tuple(dict.fromkeys(map(str.strip, found[1].split("/")))) if found else ()
    return options if len(options) > 1 else None


def option_completion(row: Mapping[str, str], option: str) -> str:
    """The completion that gives `option` as the answer: the row's `output` with the `answer` in it replaced.

    Args:
        row: A row whose `output` names its `answer` once, as a word of its own ("the correct answer is answer2").
        option: The answer to give instead.

    Returns:
        The text, equal to `row["output"]` for `option == row["answer"]`.

    Raises:
        ValueError: `output` does not name `answer`, or more than once: in all options' texts the other place would
            give the right one away.
    """
    answer, output = row["answer"], row["output"]
    place = _find_word(answer, output)
    if not place:
        raise ValueError(f"the output must contain the answer {answer!r}, got {output!r}")
    if _mentions(answer, output) > 1:
        raise ValueError(f"for the likelihood the output must name the answer {answer!r} once, got {output!r}")
    return output[: place.start()] + option + output[place.end() :]


def answer_problem(row: Mapping[str, str]) -> str | None:
    """Why a row with options is not fit to train on: its `answer` is no option, or its `output` gives another.

    Args:
        row: A row with `instruction` and `output`; without options or without an `answer` there is nothing to compare.

    Returns:
        What must hold and what was given, or None.
    """
    options, answer = options_of(row), row.get("answer")
    if not options or not answer:
        return None
    if answer not in options:
        return f"the answer must be one of {'/'.join(options)}, got {answer!r}"
    given = extract_answer(row["output"], options)
    return None if given == answer else f"the output must give the answer {answer!r}, got {given!r}"


def choose_scorer(row: Mapping[str, str], scorer: str = "auto") -> str:
    """Decide how a row is scored, and check that it can be.

    Args:
        row: A row with `instruction`, `output` and `answer`.
        scorer: `"likelihood"` (needs options), `"generate"`, or `"auto"`: the former for rows with options whose
            output names the answer once, in its own case, the latter for all others.

    Returns:
        `"likelihood"` or `"generate"`.

    Raises:
        ValueError: `scorer` is none of the three, or the row lacks what the scorer needs: an answer; with options, an
            answer that is one of them; for the likelihood, options and an output that names the answer once.
    """
    if scorer not in SCORERS:
        raise ValueError(f"scorer must be one of {', '.join(SCORERS)}, got {scorer!r}")
    options = options_of(row)
    if not row["answer"]:
        raise ValueError("a row to be scored must have an answer, got an empty one")
    if options and row["answer"] not in options:
        raise ValueError(f"the answer must be one of {'/'.join(options)}, got {row['answer']!r}")
    mentions, exact = _mentions(row["answer"], row["output"]), _find_word(row["answer"], row["output"])
    suits = options and mentions < 2 and (exact or not mentions)
    if scorer == "generate" or (scorer == "auto" and not suits):
        return "generate"
    if not options:
        raise ValueError("the likelihood needs an instruction that ends in 'Answer format: a/b/...', got one without")
    option_completion(row, row["answer"])
    return "likelihood"


def extract_answer(text: str, options: Sequence[str]) -> str | None:
    """Read which of the options a generated text gives as its answer.

    The last "answer is X" or "answer: X" decides, else an option that the text begins with as a sentence of its own
    ("Yes. ...", "(B) ..."), else the last option named; whole words only, in upper or lower case. An option of one
    letter must have its own case unless it ends the text or stands before punctuation: "a" is an article more often
    than an answer. No answer are: lists of different options ("answer1/answer2", "true or false"), what follows
    "Answer format:", options that head their own text ("Answer1: ... Answer2: ..."), and everything from the next
    "### Instruction" on.

    Args:
        text: What the model wrote after the prompt.
        options: The options as `options_of` returns them.

    Returns:
        One of `options`, or None where the text names none.
    """
    spelled, text = {_lettered(option): option for option in options}, _lettered(text)
    options = sorted(spelled, key=len, reverse=True)  # of two that begin alike, the longer one is tried first
    word = _whole("|".join(map(_option_pattern, options)))

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
    stated = [match[1] for match in re.finditer(rf"answer(?: is\b|:)\W{{0,5}}?({word})", text, re.IGNORECASE)]
    first = re.match(rf"\W*?({word})(?:\W*\Z|[.:)\]*])", text, re.IGNORECASE)
    if first and not stated:
        stated = [first[1]]
    answers = [_same_option(stated[-1], options)] if stated else named(text)
    return spelled[answers[-1]] if answers else None


def extract_number(text: str) -> str | None:
    """Read the last number of a generated text, up to the next "### Instruction".

    Args:
        text: What the model wrote after the prompt.

    Returns:
        The number without thousands commas ("22,902." gives "22902"), or None where the text holds none.
    """
    numbers = _NUMBER.findall(_before_next_question(text))
    return _plain(numbers[-1]) if numbers else None


def grade(row: Mapping[str, str], text: str) -> tuple[str | None, bool]:
    """Read the answer from a generated text and compare it with the row's.

    Rows with options: see `extract_answer`. Rows whose answer is a number: the last number in the text, right when it
    differs by at most 0.001. Others: what follows the last "answer is", right when it begins with the answer; where
    there is none the whole text, right when it is the answer but for punctuation around it. Case is ignored.

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
        right = prediction is not None and abs(Decimal(prediction) - Decimal(_plain(answer))) <= NUMBER_TOLERANCE
        return prediction, right
    text = _before_next_question(text)
    lettered, whole = _lettered(text), re.escape(_lettered(" ".join(answer.split())))
    stated = list(_STATED.finditer(lettered))
    if not stated:
        found = whole and next(filter(_is_all, re.finditer(f"(?=({whole}))", lettered, re.IGNORECASE)), None)
        return (text[slice(*found.span(1))], True) if found else (text.strip() or None, False)
    last = stated[-1]
    found = whole and re.compile(rf"\W{{0,5}}?({whole})(?!\w)", re.IGNORECASE).match(lettered, last.start(1))
    return (text[slice(*found.span(1))], True) if found else (text[slice(*last.span(2))] or None, False)


def _is_all(found: re.Match[str]) -> bool:
    """Whether the text has nothing beside the match's group but what may stand around an answer."""
    start, end = found.span(1)
    return bool(_AROUND.fullmatch(found.string, 0, start) and _AROUND.fullmatch(found.string, end))


def _lettered(text: str) -> str:
    """The text, place by place, with a letter for every mark: what may be searched for whole words."""
    return text if text.isascii() else text.translate(_LETTERS)


def _find_word(word: str, text: str) -> re.Match[str] | None:
    return re.search(_whole(re.escape(_lettered(word))), _lettered(text))


def _mentions(answer: str, output: str) -> int:
    """How often an output names an answer, in upper or lower case; one of a single letter in its own."""
    word = _whole(re.escape(_lettered(answer)))
    return len(re.findall(word, _lettered(output), re.IGNORECASE if len(answer) > 1 else 0))


def _whole(pattern: str) -> str:
    """The pattern, not inside a longer word."""
    return rf"(?<!\w)(?:{pattern})(?!\w)"


def _option_pattern(option: str) -> str:
    """What spells an option in a text that is searched whatever the case."""
    escaped = re.escape(option)
    return rf"(?-i:{escaped})|{escaped}(?=\s*\Z|[.,;:!?)\]*])" if len(option) == 1 else escaped


def _same_option(text: str, options: Sequence[str]) -> str:
    """The option that a match spells; by matching again, as some characters match without sharing a lower case."""
    if text in options:
        return text
    return next(option for option in options if re.fullmatch(re.escape(option), text, re.IGNORECASE))


def _before_next_question(text: str) -> str:
    """What belongs to the question asked: a model that goes on may write the next one and answer it too.

    With one space for every run of whitespace, since no answer depends on how a model breaks its lines.
    """
    return " ".join(text.split()).split("### Instruction", 1)[0]


def _plain(number: str) -> str:
    """A number without thousands commas and with a hyphen for a minus."""
    return number.replace(",", "").replace("\u2212", "-")
