"""The loader: what it takes, and that whatever is wrong is named by file and row."""

import json
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lslora import json_rows
from lslora.data import DataError, RowFile, load_examples, load_rows, to_messages, to_prompt_completion
from lslora.json_rows import MAX_ROW_BYTES

ROW = {"instruction": "Say hi.", "input": "", "output": "hi", "answer": "hi"}


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_json_and_jsonl_give_the_same_rows(tmp_path):
    rows = [ROW | {"output": f"é\u2028{i}", "extra": i} for i in range(3)]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=i == 0) for i, row in enumerate(rows)) + "\r\n\r\n"
    expected = [ROW | {"output": f"é\u2028{i}", "task": ""} for i in range(3)]
    assert load_rows(write(tmp_path / "a.jsonl", lines)) == expected
    assert load_rows(write(tmp_path / "a.json", json.dumps(rows, indent=2))) == expected
    assert load_rows(write(tmp_path / "bom.jsonl", "\ufeff" + lines)) == expected


def test_optional_fields_may_be_left_out(tmp_path):
    (row,) = load_rows(write(tmp_path / "a.jsonl", '{"instruction": "a", "output": "b"}'))
    assert row == {"instruction": "a", "output": "b", "input": "", "answer": "", "task": ""}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ("[]", "holds no rows"),
        ("[1]", "row 1: must be a JSON object, got int"),
        ("[{},", "line 1: no valid JSON"),
        ('{"instruction": "a"}', "line 1: field 'output' is missing"),
        ('\n{"output": "a"}', "line 2: field 'instruction' is missing"),
        ('{"instruction": "a", "output": 3}', "line 1: field 'output' must be a string, got int"),
        ('{"instruction": " ", "output": "b"}', "line 1: field 'instruction' is empty"),
        (
            '{"instruction": "a", "output": "b", "answer": null}',
            "line 1: field 'answer' must be a string, got NoneType",
        ),
        ('{"instruction": "a", "output": "b"}\n{"instr', "line 2: no valid JSON: Unterminated string"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    path = write(tmp_path / "bad", text)
    with pytest.raises(DataError) as error:
        load_rows(path)
    assert str(path) in str(error.value) and message in str(error.value)


def test_all_bad_rows_are_counted_and_ten_shown(tmp_path):
    path = write(tmp_path / "bad.jsonl", "\n".join([json.dumps(ROW), *["{}"] * 12]))
    with pytest.raises(DataError) as error:
        load_rows(path)
    message = str(error.value)
    assert "12 bad row(s)" in message and "line 2:" in message and "line 11:" in message and "and 2 more" in message
    assert "line 12:" not in message and "line 1:" not in message


def test_files_that_are_no_text(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        load_rows(tmp_path / "nothing")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        load_rows(tmp_path)
    with pytest.raises(DataError, match="must be UTF-8 text, but byte 17 is not"):
        load_rows(write(tmp_path / "latin", '{"instruction": "é"}', "latin-1"))


def values_of(path):
    """What is read of a file, or the error's message."""
    try:
        return [(place, type(value), value) for place, value in json_rows.read_values(path)]
    except DataError as error:
        return str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(JSON, max_size=4),
    st.sampled_from([None, 0, 1]),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.booleans(),
    st.integers(0, 40),
    st.binary(max_size=2),
)
def test_what_is_read_does_not_depend_on_the_size_of_the_pieces(rows, indent, newline, array, cut, insert):
    """Whole files and files with something strange in them, read at once and some bytes at a time."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = json.dumps(rows, indent=indent, ensure_ascii=False) if array else "\n".join(lines)
    content = text.replace("\n", newline).encode()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder, "file")
        for damaged in (content, content[:cut] + insert + content[cut:], content[:cut]):
            path.write_bytes(damaged)
            patch.setattr(json_rows, "PIECE", 1 << 16)
            at_once = values_of(path)
            for size in (1, 3, 8):
                patch.setattr(json_rows, "PIECE", size)
                assert values_of(path) == at_once


def test_a_large_file_is_read_without_being_held(tmp_path):
    path = tmp_path / "rows"
    row = json.dumps(ROW | {"output": "x" * 1000})
    for text in ("\n".join([row] * 20_000), f"[{', '.join([row] * 20_000)}]"):
        path.write_text(text, encoding="utf-8")
        tracemalloc.start()
        rows = RowFile(path)
        assert len(rows) == sum(1 for _ in rows) == 20_000
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1e6 < path.stat().st_size / 20


def test_a_file_that_changes_while_it_is_used(tmp_path):
    path = write(tmp_path / "rows", "\n".join([json.dumps(ROW)] * 3))
    rows = RowFile(path)
    assert list(rows) == load_rows(path) == list(rows)
    for count in (2, 4):
        write(path, "\n".join([json.dumps(ROW)] * count))
        with pytest.raises(DataError, match=f"must stay as it is while it is used, had 3 rows, has {count}"):
            list(rows)
    write(path, "{}")
    with pytest.raises(DataError, match="line 1: field 'instruction' is missing"):
        list(rows)


def test_prompt_and_completion():
    plain = to_prompt_completion(ROW)
    assert plain == {"prompt": "### Instruction:\nSay hi.\n\n### Response:\n", "completion": "hi"}
    with_input = to_prompt_completion(ROW | {"input": "loudly"})
    assert with_input["prompt"] == "### Instruction:\nSay hi.\n\n### Input:\nloudly\n\n### Response:\n"


def test_messages():
    assert to_messages(ROW | {"input": "loudly"}) == {
        "prompt": [{"role": "user", "content": "Say hi.\n\nloudly"}],
        "completion": [{"role": "assistant", "content": "hi"}],
    }
    assert to_messages(ROW)["prompt"] == [{"role": "user", "content": "Say hi."}]


def said(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_examples_of_every_kind(tmp_path):
    row = write(tmp_path / "row", json.dumps(ROW | {"text": "as other sets have beside", "messages": 1}))
    assert load_examples(row) == [to_prompt_completion(ROW)]
    assert load_examples(row, chat_template=True) == [to_messages(ROW)]

    text = write(tmp_path / "text", json.dumps({"text": " once upon "}))
    assert load_examples(text) == [{"text": " once upon "}]
    with pytest.raises(DataError, match="text: a chat template needs instructions or messages"):
        load_examples(text, chat_template=True)


def test_every_answer_of_a_conversation_is_an_example(tmp_path):
    turns = said(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    path = write(tmp_path / "chat", json.dumps([{"messages": turns, "id": 1}, {"messages": turns[1:3]}]))
    assert load_examples(path) == [
        {"prompt": turns[:2], "completion": turns[2:3]},
        {"prompt": turns[:4], "completion": turns[4:]},
        {"prompt": turns[1:2], "completion": turns[2:3]},
    ]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"text": "a"}, "line 2: field 'messages' is missing"),
        ({"messages": "a"}, "line 2: field 'messages' is missing or no list"),
        ({"messages": []}, r"line 2: messages must begin .* got \[\]"),
        ({"messages": ["a"]}, "line 2: message 1 must be a JSON object, got str"),
        ({"messages": said(("user", "a"), ("assistant", "b"), ("user", "c"))}, "end with the assistant"),
        ({"messages": said(("assistant", "a"), ("user", "a"), ("assistant", "a"))}, "begin with another role"),
        ({"messages": said(("user", "a"), ("assistant", " "))}, "line 2: message 2: field 'content' is empty"),
        ({"messages": said(("user", "a"), ("assistant", 1))}, "message 2: field 'content' must be a string, got int"),
        ({"messages": [{"content": "a"}]}, "message 1: field 'role' is missing"),
        ({"messages": said(("user", "a"), ("assistant", "b")), "tools": [{}]}, "line 2: field 'tools' must be absent"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{}]}]},
            "line 2: message 2: field 'tool_calls' must be absent",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
            "line 2: message 2: field 'weight' must be 1, since every answer is learned, got 0",
        ),
    ],
)
def test_what_is_wrong_with_messages_is_named(tmp_path, bad, message):
    good = {"messages": said(("user", "a"), ("assistant", "b"))}
    path = write(tmp_path / "chat", f"{json.dumps(good)}\n{json.dumps(bad)}")
    with pytest.raises(DataError, match=message):
        load_examples(path)


def test_a_file_holds_one_kind(tmp_path):
    path = write(tmp_path / "mixed", '{"text": "a"}\n{"instruction": "a", "output": "b"}')
    with pytest.raises(DataError, match="line 2: field 'text' is missing"):
        load_examples(path)


@given(st.binary(max_size=200))
def test_any_bytes_give_rows_or_a_data_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "file"
    path.write_bytes(content)
    try:
        rows = load_rows(path)
    except DataError:
        return
    assert rows and all(row["instruction"].strip() and row["output"].strip() for row in rows)


TEXTS = st.text() | st.sampled_from(["a", "true", "maybe", "Is it?\n\nAnswer format: true/false", "\ud800", "\0"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXTS | VALUES}))
FIELDS = dict.fromkeys(("instruction", "output", "input", "answer", "task", "text"), TEXTS | VALUES)
OBJECTS = st.fixed_dictionaries({}, optional=FIELDS | {"messages": MESSAGES | VALUES})


@given(st.lists(OBJECTS | VALUES, max_size=4), st.booleans(), st.booleans())
def test_any_json_gives_valid_examples_or_a_data_error(tmp_path_factory, values, lines, chat):
    path = tmp_path_factory.mktemp("any") / "file"
    path.write_text("\n".join(map(json.dumps, values)) if lines else json.dumps(values), encoding="utf-8")
    try:
        examples = load_examples(path, chat_template=chat)
    except DataError as error:
        assert str(error).startswith(f"{path}: ")
        return
    assert examples
    for example in examples:
        texts = [example["text"]] if "text" in example else [example["prompt"], example["completion"]]
        if len(texts) > 1 and isinstance(texts[0], list):
            texts = [message["content"] for part in texts for message in part]
        assert all(text.strip() and text.encode() and "\0" not in text for text in texts)


def test_the_limit_of_a_row_is_in_bytes(tmp_path):
    empty = len(json.dumps({"text": ""}))
    for character, size in (("x", 1), ("é", 2)):
        fits = {"text": character * ((MAX_ROW_BYTES - empty) // size)}
        path = write(tmp_path / "fits", json.dumps(fits, ensure_ascii=False))
        assert load_examples(path) == [fits]
        longer = {"text": fits["text"] + character}
        for content in (longer, [longer]):
            path = write(tmp_path / "longer", json.dumps(content, ensure_ascii=False))
            with pytest.raises(DataError, match="1: a row must have at most 1,000,000 bytes, got 1,000,00"):
                load_examples(path)


def test_long_values_are_not_repeated_whole(tmp_path):
    instruction = "Answer format: " + "/".join(f"option{i}" for i in range(2000))
    with pytest.raises(DataError) as error:
        load_rows(write(tmp_path / "rows", json.dumps({"instruction": instruction, "output": "a", "answer": "b"})))
    assert "the answer must be one of option0/option1/" in str(error.value) and len(str(error.value)) < 1000
