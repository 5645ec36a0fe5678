"""Make the embedded commonsense set: short questions in the eight task formats of the LLM-Adapters collection.

    python dataset/make_commonsense_mini.py

The questions come from the facts in `commonsense_facts`. A fact goes into one split only, so no test row can be
answered by heart. The same facts and seed give the same files, byte for byte.
"""

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from commonsense_facts import actions, likings, people, science, things
from commonsense_formats import Row, choice_row, true_false_row

SEED = 0
# Most rows ask what people like: the questions that a small model learns to answer within a few minutes.
LIKING_ROWS = {"train": 1140, "test": 132}
ROWS_PER_TASK = {"train": 36, "test": 24}  # of all else; multiples of 2, 3 and 4: every answer is right equally often
OPTIONS = {"piqa": 2, "siqa": 3, "hellaswag": 4, "winogrande": 2, "arc_easy": 4, "arc_challenge": 4, "openbookqa": 4}
HELD_OUT = 4  # one fact in this many is kept for the test split
DRAWS = 100
ACTORS = (("A woman", "She"), ("A man", "He"), ("The girl", "She"), ("The boy", "He"))

T = TypeVar("T")


class Fact(NamedTuple):
    """A question in several wordings, its right answer, and answers that are clearly wrong."""

    stems: tuple[str, ...]
    right: str
    wrong: list[str]


class Tables(NamedTuple):
    """The fact tables of one split."""

    families: list[things.Family]
    science: list[science.Topic]
    goals: list[actions.Goal]
    activities: list[actions.Activity]
    moments: list[tuple[tuple[str, ...], list[people.Moment]]]
    contrasts: list[people.Contrast]
    likings: dict[str, list[str]]


def split_facts(facts: Iterable[T], held_out: bool) -> list[T]:
    """Keep every fourth fact, or the others."""
    return [fact for number, fact in enumerate(facts) if (number % HELD_OUT == HELD_OUT - 1) == held_out]


def split_groups(groups: dict[str, list[str]], held_out: bool) -> dict[str, list[str]]:
    """Keep every fourth member over all groups, or the others, and the groups that still have members."""
    pairs = [(key, member) for key, members in groups.items() for member in members]
    kept: dict[str, list[str]] = {}
    for key, member in split_facts(pairs, held_out):
        kept.setdefault(key, []).append(member)
    return kept


def split_tables(held_out: bool) -> Tables:
    """The tables of the test split (`held_out`) or of the training split."""
    moments = [
        (people.FEELING_QUESTIONS, people.FEELINGS),
        (people.WANT_QUESTIONS, people.WANTS),
        (people.NEED_QUESTIONS, people.NEEDS),
    ]
    return Tables(
        families=[family._replace(groups=split_groups(family.groups, held_out)) for family in things.FAMILIES],
        science=[topic._replace(answers=split_groups(topic.answers, held_out)) for topic in science.TOPICS],
        goals=split_facts(actions.GOALS, held_out),
        activities=split_facts(actions.ACTIVITIES, held_out),
        moments=[(questions, split_facts(table, held_out)) for questions, table in moments],
        contrasts=[contrast._replace(pairs=split_facts(contrast.pairs, held_out)) for contrast in people.CONTRASTS],
        likings={
            answer: split_facts(facts, held_out)
            for answer, facts in (("true", likings.LIKED), ("false", likings.DISLIKED))
        },
    )


def sentence(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def which_member(tables: Tables) -> Iterator[Fact]:
    """Questions about a key, such as "Which of these is a bird?"."""
    for family in tables.families:
        for key, members in family.groups.items():
            stems = tuple(sentence(stem.format(key=key)) for stem in family.which_member)
            wrong = [other for group, others in family.groups.items() if group != key for other in others]
            yield from (Fact(stems, member, wrong) for member in members)


def which_key(tables: Tables) -> Iterator[Fact]:
    """Questions about a member, such as "What is a robin?"."""
    for family in tables.families:
        for key, members in family.groups.items():
            wrong = [group for group in family.groups if group != key]
            for member in members if family.which_key else ():
                yield Fact(tuple(sentence(stem.format(member=member)) for stem in family.which_key), key, wrong)


def which_explanation(tables: Tables) -> Iterator[Fact]:
    """Questions of school science."""
    for topic, whole in zip(tables.science, science.TOPICS, strict=True):
        for answer, cases in topic.answers.items():
            wrong = [other for other in whole.answers if other != answer]
            yield from (
                Fact(tuple(stem.format(case=case) for stem in topic.questions), answer, wrong) for case in cases
            )


def which_solution(tables: Tables) -> Iterator[Fact]:
    """Questions about how to do something."""
    for topic, goal, solution in tables.goals:
        stems = (f"How do you {goal}?", f"To {goal}, you can", f"What is a good way to {goal}?")
        yield Fact(stems, solution, [other.solution for other in tables.goals if other.topic != topic])


def which_ending(tables: Tables) -> Iterator[Fact]:
    """The starts of everyday scenes, each with several people who may act in it."""
    for topic, name, context, ending in tables.activities:
        stems = tuple(f"{name}: {context.format(person=person, pronoun=pronoun)}" for person, pronoun in ACTORS)
        yield Fact(stems, ending, [other.ending for other in tables.activities if other.topic != topic])


def which_reaction(tables: Tables) -> Iterator[Fact]:
    """Questions about what people feel, want and need."""
    number = 0
    for questions, moments in tables.moments:
        for group, event, answer, wrong in moments:
            others = wrong or [other.answer for other in moments if other.group != group]
            stems = []
            for question in questions:
                name = people.NAMES[number % len(people.NAMES)]
                stems.append(f"{event}. {question}".format(name=name))
                number += 1
            yield Fact(tuple(stems), answer, list(others))


def which_thing(tables: Tables, rng: random.Random) -> Iterator[Fact]:
    """Sentences with a blank for one of two things, either of which is right in one of them."""
    for frames, claims, pairs in tables.contrasts:
        for pair in pairs:
            for claim, right, wrong in zip(claims, pair, reversed(pair), strict=True):
                first, second = rng.sample(pair, 2)
                stems = tuple(f"{frame.format(first=first, second=second)} {claim}." for frame in frames)
                yield Fact(stems, right, [wrong])


def asked_facts(facts: list[Fact], rng: random.Random) -> Iterator[tuple[str, Fact]]:
    """Every fact with one of its stems in random order, then every fact with another of its stems, and so on."""
    shuffled = [fact._replace(stems=tuple(rng.sample(fact.stems, len(fact.stems)))) for fact in facts]
    for turn in range(max(len(fact.stems) for fact in facts)):
        rng.shuffle(shuffled)
        yield from ((fact.stems[turn], fact) for fact in shuffled if turn < len(fact.stems))


def draw_wrong(fact: Fact, count: int, ranks: list[int], rng: random.Random) -> tuple[int, int, list[str]]:
    """Draw wrong options of which as many as one of `ranks` says are longer than the right one, the rest shorter.

    Returns by how many the best draw misses its rank, the rank, and the options.
    """

    def misses(draw: list[str], rank: int) -> int:
        longer = sum(len(text) > len(fact.right) for text in draw)
        shorter = sum(len(text) < len(fact.right) for text in draw)
        return abs(longer - rank) + abs(shorter - (count - rank))

    draws = [rng.sample(fact.wrong, count) for _ in range(DRAWS)]
    wanted = sorted(set(ranks), key=ranks.count, reverse=True)
    return min(((misses(draw, rank), rank, draw) for rank in wanted for draw in draws), key=lambda choice: choice[0])


def evenly(count: int, options: int, rng: random.Random) -> list[int]:
    """The indices below `options` in random order, each equally often."""
    indices = [number % options for number in range(count)]
    rng.shuffle(indices)
    return indices


def choice_rows(task: str, facts: Iterable[Fact], count: int, rng: random.Random) -> list[Row]:
    """Ask about the facts with options; the answer's position and its rank in length are both spread evenly."""
    options = OPTIONS[task]
    waiting = list(asked_facts([fact for fact in facts if len(fact.wrong) >= options - 1], rng))
    ranks = evenly(count, options, rng)
    rows = []
    for position in evenly(count, options, rng):
        # The first fact that can be asked with a rank still to be had; else the one that comes closest.
        best = None
        for number, (_, fact) in enumerate(waiting):
            missed, rank, texts = draw_wrong(fact, options - 1, ranks, rng)
            if best is None or missed < best[0]:
                best = (missed, number, rank, texts)
            if missed == 0:
                break
        _, number, rank, texts = best
        stem, fact = waiting.pop(number)
        ranks.remove(rank)
        texts.insert(position, fact.right)
        rows.append(choice_row(task, stem, texts, position))
    return rows


def yes_no_rows(tables: Tables, count: int, rng: random.Random) -> list[Row]:
    """Ask whether things are so, as often about what is true as about what is false."""
    members = [
        (family, key, member)
        for family in tables.families
        for key, members in family.groups.items()
        for member in members
    ]
    rows = []
    for truth, (family, key, member) in zip(evenly(count, 2, rng), rng.sample(members, count), strict=True):
        asked = key if truth else rng.choice([other for other in family.groups if other != key])
        rows.append(true_false_row("boolq", rng.choice(family.yes_no).format(member=member, key=asked), bool(truth)))
    return rows


def liking_rows(tables: Tables, count: int, rng: random.Random) -> list[Row]:
    """Ask whether people like things, as often about what they like as about what they do not."""
    rows = []
    for answer, liked in tables.likings.items():
        questions = [question.format(thing=thing) for question in likings.QUESTIONS for thing in liked]
        rows += [true_false_row("boolq", text, answer == "true") for text in rng.sample(questions, count // 2)]
    return rows


def make_rows(split: str) -> list[Row]:
    """All rows of a split in random order."""
    tables = split_tables(held_out=split == "test")
    count = ROWS_PER_TASK[split]
    rng = random.Random(f"{SEED} {split}")
    rows = liking_rows(tables, LIKING_ROWS[split], rng) + yes_no_rows(tables, count, rng)
    for task, facts in (
        ("piqa", which_solution(tables)),
        ("siqa", which_reaction(tables)),
        ("hellaswag", which_ending(tables)),
        ("winogrande", which_thing(tables, rng)),
        ("arc_easy", which_member(tables)),
        ("arc_challenge", which_explanation(tables)),
        ("openbookqa", which_key(tables)),
    ):
        rows += choice_rows(task, facts, count, rng)
    rng.shuffle(rows)
    return rows


def main() -> None:
    """Write `train.jsonl` and `test.jsonl`."""
    parser = argparse.ArgumentParser(description="Make the embedded commonsense set.")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "commonsense_mini")
    output_dir = parser.parse_args().output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    for split in ROWS_PER_TASK:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(split))
        (output_dir / f"{split}.jsonl").write_bytes(lines.encode())


if __name__ == "__main__":
    main()
