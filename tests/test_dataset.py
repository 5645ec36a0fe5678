"""The embedded commonsense set, the script that makes it, and the converters that build the real one."""

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from lslora.data import load_rows

ROOT = Path(__file__).parents[1]
DATASET = ROOT / "dataset"
REAL_ROWS = ROOT.parent / "shared" / "data" / "commonsense"
sys.path.insert(0, str(DATASET))

import prepare_commonsense  # noqa: E402

SPLITS = ("train", "test")
MIN_ROWS = {"train": (1200, 36), "test": (300, 24)}  # in all, of each task

BOOLQ = r"Please answer the following question with true or false, question: [^\n]+\?\n\nAnswer format: true/false"
ANSWERS = (
    r"Please choose the correct answer to the question: (?s:.+)\n\n"
    r"Answer1: .+ Answer2: .+ Answer3: .+?(?: Answer4: .+?)?(?: Answer5: .+)?\n\n"
    r"Answer format: answer1/answer2/answer3(?:/answer4)?(?:/answer5)?"
)
FORMATS = {
    "boolq": BOOLQ,
    "piqa": (
        r"Please choose the correct solution to the question: .+\n\nSolution1: .+\n\nSolution2: .+\n\n"
        r"Answer format: solution1/solution2"
    ),
    "siqa": (
        r"Please choose the correct answer to the question: .+\n\nAnswer1: .+ Answer2: .+ Answer3: .+\n\n"
        r"Answer format: answer1/answer2/answer3"
    ),
    "hellaswag": (
        r"Please choose the correct ending to complete the given sentence: .+: .+\n\n"
        r"Ending1: .+ Ending2: .+ Ending3: .+ Ending4: .+\n\nAnswer format: ending1/ending2/ending3/ending4"
    ),
    "winogrande": (
        r"Please choose the correct answer to fill in the blank to complete the given sentence: .*_.*\n\n"
        r"Option1: .+ Option2: .+ Answer format: option1/option2"
    ),
    "arc_easy": ANSWERS,
    "arc_challenge": ANSWERS,
    "openbookqa": ANSWERS,
}
MARKER = re.compile(r"\s*\b(?:Answer|Solution|Ending|Option)\d: ")


def answer_names(row):
    return row["instruction"].rsplit("Answer format: ", 1)[1].split("/")


def question_and_options(row):
    """The question and its options, normalised in case and white space."""
    body = row["instruction"].rsplit("Answer format: ", 1)[0]
    return [" ".join(part.lower().split()) for part in MARKER.split(body)]


def identity(row):
    question, *options = question_and_options(row)
    return question, frozenset(options)


@pytest.fixture(scope="module")
def rows():
    return {split: load_rows(DATASET / "commonsense_mini" / f"{split}.jsonl") for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_every_task_has_enough_rows(rows, split):
    counts = Counter(row["task"] for row in rows[split])
    in_all, of_each = MIN_ROWS[split]
    assert set(counts) == set(FORMATS)
    assert counts.total() >= in_all
    assert min(counts.values()) >= of_each


@pytest.mark.parametrize("split", SPLITS)
def test_rows_follow_the_format_of_their_task(rows, split):
    for row in rows[split]:
        assert re.fullmatch(FORMATS[row["task"]], row["instruction"]), row
        assert row["input"] == ""
        assert row["answer"] in answer_names(row)
        assert row["output"] == f"the correct answer is {row['answer']}"
        assert len(question_and_options(row)) - 1 == (0 if row["task"] == "boolq" else len(answer_names(row)))


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_short_and_well_formed(rows, split):
    lengths = [len(row["instruction"].split()) for row in rows[split]]
    assert max(lengths) <= 70
    assert sum(lengths) / len(lengths) <= 45
    for row in rows[split]:
        text = row["instruction"]
        assert not re.search(r"[{}]|  |\b[Aa] [aeiouAEIOU]|\b[Aa]n [^aeiouAEIOUhX]|\.\.| [.,;?]", text), text


@pytest.mark.parametrize("split", SPLITS)
def test_options_of_a_row_differ(rows, split):
    for row in rows[split]:
        _, *options = question_and_options(row)
        assert len(set(options)) == len(options), row


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_balanced_within_each_task(rows, split):
    answers = defaultdict(Counter)
    for row in rows[split]:
        answers[row["task"]].update(dict.fromkeys(answer_names(row), 0))
        answers[row["task"]][row["answer"]] += 1
    for task, counts in answers.items():
        assert max(counts.values()) - min(counts.values()) <= 1, (task, counts)


def test_no_question_occurs_twice(rows):
    counts = Counter(identity(row) for split in SPLITS for row in rows[split])
    assert [question for question, count in counts.items() if count > 1] == []


def test_right_answers_of_the_test_split_are_new_to_their_question(rows):
    """A test row must not repeat a training row's question with the same answer among other wrong options."""

    def fact(row):
        question, *options = question_and_options(row)
        right = options[answer_names(row).index(row["answer"])] if options else row["answer"]
        return row["task"], question, right

    assert {fact(row) for row in rows["test"]}.isdisjoint(fact(row) for row in rows["train"])


@pytest.mark.parametrize("choose", [max, min], ids=["longest", "shortest"])
@pytest.mark.parametrize("split", SPLITS)
def test_length_of_the_options_does_not_give_the_answer_away(rows, split, choose):
    excess = defaultdict(list)
    for row in rows[split]:
        _, *options = question_and_options(row)
        if options:
            guess = answer_names(row)[options.index(choose(options, key=len))]
            excess[row["task"]].append((guess == row["answer"]) - 1 / len(options))
    per_task = {task: sum(values) / len(values) for task, values in excess.items()}
    assert len(per_task) == len(FORMATS) - 1
    # Short of chance the answer is given away too: never the longest option.
    assert {task: value for task, value in per_task.items() if abs(value) > 0.08} == {}
    assert abs(sum(per_task.values()) / len(per_task)) <= 0.04


def test_script_makes_the_files_byte_for_byte(tmp_path):
    script = DATASET / "make_commonsense_mini.py"
    subprocess.run([sys.executable, script, "--output_dir", tmp_path / "made"], check=True)
    for split in SPLITS:
        committed = DATASET / "commonsense_mini" / f"{split}.jsonl"
        assert (tmp_path / "made" / f"{split}.jsonl").read_bytes() == committed.read_bytes()


def labelled(key, labels="ABCD", **columns):
    texts = ["ash", "beech", "cedar", "date", "elm"][: len(labels)]
    return {**columns, "choices": {"text": texts, "label": list(labels)}, "answerKey": key}


HUB_ROWS = [
    ("boolq", {"question": "can fish sing", "passage": "No.", "answer": False}, "false", "question: can fish sing?\n"),
    ("boolq", {"question": "can fish swim", "passage": "Yes.", "answer": True}, "true", "question: can fish swim?\n"),
    (
        "piqa",
        {"goal": "Cool a drink", "sol1": "Heat it.", "sol2": "Add ice.", "label": 1},
        "solution2",
        "Cool a drink\n\nSolution1: Heat it.\n\nSolution2: Add ice.\n\n",
    ),
    (
        "siqa",
        {
            "context": "Kim fell over.",
            "question": "How does Kim feel?",
            "answerA": "hurt",
            "answerB": "smug",
            "answerC": "rich",
            "label": "1",
        },
        "answer1",
        ": Kim fell over. How does Kim feel?\n\nAnswer1: hurt Answer2: smug Answer3: rich\n\n",
    ),
    (
        "hellaswag",
        {
            "activity_label": "Health",
            "ctx": "[header] How to nap [title] Lie down.",
            "ctx_a": "unused",
            "endings": ["[step] Run.", "[step] Shut your eyes.", "[step] Shout.", "[step] Dig."],
            "label": "1",
        },
        "ending2",
        ": Health: [header] How to nap [title] Lie down.\n\nEnding1: [step] Run. Ending2: [step] Shut your eyes.",
    ),
    (
        "winogrande",
        {"sentence": "The cup broke the plate since the _ fell.", "option1": "cup", "option2": "plate", "answer": "1"},
        "option1",
        "since the _ fell.\n\nOption1: cup Option2: plate Answer format: option1/option2",
    ),
    ("arc_easy", labelled("D", question="Which bears dates?"), "answer4", "Answer4: date\n\n"),
    ("arc_easy", labelled("2", "1234", question="Which is a beech?"), "answer2", "Answer1: ash Answer2: beech "),
    ("arc_challenge", labelled("C", "ABC", question="A cedar?"), "answer3", "format: answer1/answer2/answer3"),
    ("arc_challenge", labelled("E", "ABCDE", question="An elm?"), "answer5", "answer3/answer4/answer5"),
    ("openbookqa", labelled("A", question_stem="Ash is"), "answer1", "question: Ash is\n\nAnswer1: ash "),
]


@pytest.mark.parametrize(("task", "hub_row", "answer", "part"), HUB_ROWS)
def test_converter(task, hub_row, answer, part):
    row = prepare_commonsense.SOURCES[task].convert(hub_row)
    assert re.fullmatch(FORMATS[task], row["instruction"])
    assert part in row["instruction"]
    assert row["answer"] == answer
    assert row["answer"] in answer_names(row)
    assert row["output"] == f"the correct answer is {answer}"
    assert row["input"] == ""
    assert row["task"] == task


GOOD = {task: hub_row for task, hub_row, _, _ in HUB_ROWS}
BAD_ROWS = [
    ("boolq", {**GOOD["boolq"], "answer": "yes"}, "answer must be true or false, got 'yes'"),
    ("piqa", {**GOOD["piqa"], "label": -1}, "the answer must be one of the 2 options, got number 0"),
    ("siqa", {**GOOD["siqa"], "label": "4"}, "the answer must be one of the 3 options, got number 4"),
    ("siqa", {**GOOD["siqa"], "label": "0"}, "the answer must be one of the 3 options, got number 0"),
    ("hellaswag", {**GOOD["hellaswag"], "label": ""}, "invalid literal"),
    ("winogrande", {**GOOD["winogrande"], "answer": ""}, "invalid literal"),
    ("winogrande", {"sentence": "A _ B"}, "column 'option1' is missing"),
    ("arc_easy", {**GOOD["arc_easy"], "answerKey": "A"}, "answerKey must be one of the labels"),
    ("openbookqa", {**GOOD["openbookqa"], "answerKey": "E"}, "answerKey must be one of the labels"),
]


@pytest.mark.parametrize(("task", "bad_row", "message"), BAD_ROWS)
def test_bad_hub_row_is_named(task, bad_row, message):
    with pytest.raises(ValueError, match=f"^{task}: row 2: .*{re.escape(message)}"):
        prepare_commonsense.convert_rows(task, [GOOD[task], bad_row])


def test_prepare_writes_all_files(tmp_path, monkeypatch):
    hub = {
        "google/boolq": {"train": [GOOD["boolq"]] * 6000, "validation": [GOOD["boolq"]] * 3},
        "allenai/openbookqa": {"train": [GOOD["openbookqa"]] * 10, "test": [GOOD["openbookqa"]] * 2},
    }
    monkeypatch.setattr("datasets.load_dataset", lambda hub_id, config: hub[hub_id])
    prepare_commonsense.prepare(tmp_path, ["boolq", "openbookqa"], seed=1)
    written = {path.relative_to(tmp_path).as_posix(): len(load_rows(path)) for path in tmp_path.rglob("*.*")}
    assert written == {
        "commonsense_train.json": 6010,
        "commonsense_5k.json": 5000,
        "test/boolq.json": 3,
        "test/openbookqa.json": 2,
    }
    first = (tmp_path / "commonsense_5k.json").read_bytes()
    prepare_commonsense.prepare(tmp_path, ["boolq", "openbookqa"], seed=1)
    assert (tmp_path / "commonsense_5k.json").read_bytes() == first
    prepare_commonsense.prepare(tmp_path, ["boolq", "openbookqa"], seed=2)
    assert (tmp_path / "commonsense_5k.json").read_bytes() != first


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.json"
    prepare_commonsense.write_json(path, [{"answer": "true"}])
    with pytest.raises(TypeError):
        prepare_commonsense.write_json(path, [{"answer": object()}])
    assert json.loads(path.read_text(encoding="utf-8")) == [{"answer": "true"}]


@pytest.mark.skipif(not REAL_ROWS.is_dir(), reason="the real rows are not beside the checkout")
def test_formats_are_those_of_the_real_rows():
    real = load_rows(REAL_ROWS / "validation.jsonl")
    assert {row["task"] for row in real} == {"boolq", "openbookqa", "arc_easy", "arc_challenge"}
    for row in real:
        assert re.fullmatch(FORMATS[row["task"]], row["instruction"]), row
