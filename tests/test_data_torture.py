"""Bad data files: told by the loaders and by the scripts, never trained on in silence."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lslora.data import load_examples, load_rows
from tests.torture import data
from tests.torture.data_cases import CASES, PLAIN, ROW, TALK
from tests.torture.data_check import LOADERS, whats_wrong
from tests.torture.data_mutations import fuzzed

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "tests" / "torture" / "corpus" / "data"
sys.path.insert(0, str(ROOT))

import calculate_score  # noqa: E402
import eval_lslora  # noqa: E402
import export_lslora  # noqa: E402
import train_lslora  # noqa: E402


def bad(verdicts):
    return {name: verdict for name, verdict in verdicts.items() if verdict.kind in ("traceback", "silent")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hand_made_files_are_refused_in_words(case, tmp_path):
    assert not bad(data.check_case(case, tmp_path)[1])


def test_fuzzed_files_are_refused_or_valid(tmp_path):
    found = [data.check_fuzzed(f"test-{number}", tmp_path)[1] for number in range(500)]
    assert not [bad(verdicts) for verdicts in found if bad(verdicts)]
    for name in LOADERS:
        assert {verdicts[name].kind for verdicts in found} == {"refused", "accepted"}  # or nothing was looked at
    assert fuzzed("test-3") == fuzzed("test-3") != fuzzed("test-4")


def test_every_file_of_the_corpus_is_refused_or_valid():
    paths = list(CORPUS.glob("*.*"))
    assert 20 <= len(paths) <= 30 and sum(path.stat().st_size for path in paths) <= 20_000
    for path in paths:
        assert not bad(data.judge_all(path)), path.name


def test_the_table_and_the_status_say_what_was_found(monkeypatch, capsys):
    monkeypatch.setattr(data, "CASES", CASES[8:12])
    assert data.main(["--fuzzed", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["hand-made,", "load_rows", "4", "4", "0", "0", "0"]
    assert lines[4].split()[:3] == ["fuzzed,", "load_rows", "20"]
    careless = {"load_rows": lambda path: [json.loads(line) for line in path.read_text().splitlines()]}
    monkeypatch.setattr(data, "LOADERS", careless | {"load_examples": load_examples})
    assert data.main(["--fuzzed", "20"]) == 1
    assert "load_rows: an empty file: silent" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ([ROW | {"answer": "maybe"}], "not among"),
        ([PLAIN | {"output": " "}], "empty"),
        ([PLAIN | {"output": "\ud800"}], "no text"),
        ([PLAIN | {"input": 1}], "no string"),
        ([], "no rows"),
    ],
)
def test_the_check_sees_what_a_careless_loader_takes(content, wrong):
    source = json.dumps(content).encode()
    assert wrong in whats_wrong(source, content)
    assert not whats_wrong(json.dumps([ROW]).encode(), [ROW])
    assert "a key stands twice" in whats_wrong(b'{"text": "a", "text": "b"}', [{"text": "b"}])


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_marks_and_any_line_ending_are_fine(tmp_path, ending, mark):
    path = tmp_path / "rows.jsonl"
    for row, load in ((ROW, load_rows), ({"messages": TALK}, load_examples), ({"text": "a"}, load_examples)):
        path.write_bytes((mark + ending.join([json.dumps(row)] * 3) + ending).encode())
        array = tmp_path / "rows.json"
        array.write_bytes((mark + json.dumps([row] * 3, indent=1).replace("\n", ending)).encode())
        assert len(load(path)) == 3 and load(path) == load(array)


THROUGH_SCRIPTS = ("a pipe", "gzip", "a key twice", "an answer that is no option")
SCRIPT_CASES = [
    case for case in CASES if case.name in ("a pipe", "gzip", "a key twice", "an answer that is no option")
]


@pytest.mark.parametrize("case", SCRIPT_CASES, ids=lambda case: case.name)
def test_scripts_end_with_status_2_and_write_nothing(case, tmp_path, capsys):
    rows, out, adapter = tmp_path / "rows", tmp_path / "out", tmp_path / "adapter"
    case.make(rows)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "no-such-model"}')
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps(ROW))
    train = ["--model_name", "no-such-model", "--output_dir", out]
    for script, arguments in (
        (train_lslora, [*train, "--dataset_path", rows]),
        (train_lslora, [*train, "--dataset_path", good, "--eval_dataset_path", rows]),
        (eval_lslora, ["--adapter", adapter, "--dataset", good, rows, "--output", out / "results.json"]),
        (export_lslora, ["--adapter", adapter, "--dataset", rows, "--output", out]),
        (export_lslora, ["--adapter", adapter, "--dataset", good, "--eval_dataset", rows, "--output", out]),
    ):
        assert script.main([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr()
        assert case.words in said.err and str(rows) in said.err and "Traceback" not in said.err
        assert not said.out and not out.exists()


@pytest.mark.parametrize("content", ["[" * 100_000, "", '{"predictions": []}', "\ufeff{}"])
def test_results_that_are_none_are_told(content, tmp_path, capsys):
    (tmp_path / "results.json").write_text(content, encoding="utf-8")
    assert calculate_score.main([str(tmp_path / "results.json")]) == 2
    assert "results.json: must " in capsys.readouterr().err


@pytest.mark.skipif(find_spec("atheris") is None, reason="needs atheris")
def test_ten_seconds_of_coverage_guided_fuzzing(tmp_path):
    command = [sys.executable, "-m", "tests.torture.fuzz_data", tmp_path, CORPUS, "-max_total_time=10", "-seed=1"]
    command += [f"-artifact_prefix={tmp_path}/crash-", "-max_len=4096"]
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([str(c) for c in command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    assert "INITED cov:" in done.stderr and not list(tmp_path.glob("crash-*"))
