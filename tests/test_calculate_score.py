"""calculate_score.py as a person runs it, in an interpreter without site-packages: neither torch nor rich."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lslora.scoring import compare, summarize

SCRIPT = Path(__file__).parents[1] / "calculate_score.py"


def run(*arguments, first="", folder=None):
    code = first + (
        "import runpy, sys\n"
        "for name in ('torch', 'peft', 'transformers', 'rich', 'numpy', 'lslora'):\n"
        "    sys.modules[name] = None\n"
        f"sys.argv = {[SCRIPT.name, *map(str, arguments)]!r}\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60, cwd=folder
    )


def predictions(outcomes):
    return [
        {
            "index": index,
            "task": "boolq" if index < 4 else "arc",
            "answer": "true",
            "prediction": "true" if outcome == "1" else None,
            "correct": outcome == "1",
        }
        for index, outcome in enumerate(outcomes)
    ]


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write_file


def cells(figures):
    return f"{100 * figures['accuracy']:.2f} [{100 * figures['interval'][0]:.2f}, {100 * figures['interval'][1]:.2f}]"


def test_one_file(write):
    items = predictions("111010")
    result = run(write("a.json", {"predictions": items}))
    assert result.returncode == 0, result.stderr
    summary = summarize(items)
    assert cells(summary["tasks"]["boolq"]).startswith("75.00 [")
    for figures in (*summary["tasks"].values(), summary["micro"], summary["macro"]):
        assert cells(figures) in result.stdout
    assert "McNemar" not in result.stdout


def test_one_file_with_the_answers_of_the_base_model(write):
    ours, base = predictions("111010"), predictions("100010")
    both = write("both.json", {"predictions": ours, "base": {"predictions": base}})
    one, two = run(both), run(write("base.json", {"predictions": base}), write("ours.json", {"predictions": ours}))
    assert one.returncode == 0, one.stderr
    for items in (ours, base):
        assert cells(summarize(items)["micro"]) in one.stdout
    heading, differences = "in percentage points, paired, with 95 % intervals", 1
    assert f"Adapter minus base {heading}" in one.stdout and f"Second file minus first {heading}" in two.stdout
    assert one.stdout.split(heading)[differences] == two.stdout.split(heading)[differences]
    broken = run(write("broken.json", {"predictions": ours, "base": {"predictions": [{}]}}))
    assert broken.returncode == 2 and "prediction 1: field 'index' is missing" in broken.stderr


def test_a_file_may_be_called_base(write, tmp_path):
    ours, base = predictions("111010"), predictions("100010")
    write("base", {"predictions": ours, "base": {"predictions": base}})
    result = run("base", folder=tmp_path)
    assert all(cells(summarize(items)["micro"]) in result.stdout for items in (ours, base))
    assert compare(base, ours)["micro"]["difference"] > 0 and "+33.33 [" in result.stdout


def test_a_terminal_may_lack_the_characters_of_a_task(write):
    items = [item | {"task": "prüfung"} for item in predictions("10")]
    ascii_only = "import sys\nsys.stdout.reconfigure(encoding='ascii', errors='strict')\n"
    result = run(write("a.json", {"predictions": items}), first=ascii_only)
    assert result.returncode == 0 and r"pr\xfcfung" in result.stdout


def test_two_files_are_compared_item_by_item(write):
    first, second = predictions("111000"), predictions("011111")
    paths = write("a.json", {"predictions": first}), write("b.json", {"predictions": second[::-1]})
    result = run(*paths)
    assert result.returncode == 0, result.stderr
    low, high = compare(first, second)["micro"]["interval"]
    assert f"+33.33 [{100 * low:+.2f}, {100 * high:+.2f}]" in result.stdout
    # 3 items only in the second, 1 only in the first: 2 (1 + 4) / 16
    assert "McNemar p = 0.625 (3 items right only in the second, 1 only in the first, of 6)" in result.stdout


def test_three_files_stand_side_by_side(write):
    paths = [write(f"{name}.json", {"predictions": predictions("101010")}) for name in "abc"]
    result = run(*paths)
    assert result.returncode == 0
    assert all(str(path) in result.stdout.splitlines()[2] for path in paths)


def test_three_files_of_different_numbers_of_rows_are_refused(write):
    result = run(*(write(f"{row}.json", {"predictions": predictions(row)}) for row in ("1110", "11101", "1")))
    assert result.returncode == 2
    assert "files must be of the same rows" in result.stderr and result.stdout == ""


def test_three_files_of_as_many_other_rows_are_refused(write):
    others = predictions("111")
    others[1] = others[1] | {"answer": "another"}
    paths = [write(f"{i}.json", {"predictions": predictions("111")}) for i in range(2)]
    paths.append(write("other.json", {"predictions": others}))
    result = run(*paths)
    assert result.returncode == 2 and result.stdout == ""
    assert "but item 2 is (1, " in result.stderr and f"in {paths[0]} and (1, " in result.stderr
    assert f"'another') in {paths[2]}" in result.stderr


def test_two_files_with_different_items_are_refused(write):
    result = run(
        write("a.json", {"predictions": predictions("1110")}), write("b.json", {"predictions": predictions("11101")})
    )
    assert result.returncode == 2
    assert result.stderr.startswith("both must hold the same items")
    assert "index 4 (task 'arc', answer 'true')" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON in UTF-8"),
        ("[]", "must hold a list of predictions"),
        ({"predictions": []}, "must hold a list of predictions"),
        ({"predictions": ["x"]}, "prediction 1: field 'index' is missing or of the wrong type"),
        (
            {"predictions": [*predictions("1"), {"index": 1, "task": "t", "answer": "a", "prediction": 3}]},
            "prediction 2: field 'prediction' is missing",
        ),
        ({"predictions": [predictions("1")[0] | {"correct": 1}]}, "field 'correct' is missing or of the wrong type"),
    ],
)
def test_a_bad_file_is_named_in_one_line(write, content, message):
    path = write("bad.json", content)
    result = run(path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"{path}: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_missing_file_is_named(tmp_path):
    result = run(tmp_path / "missing.json")
    assert result.returncode == 2
    assert result.stderr == f"{tmp_path / 'missing.json'}: cannot be read: No such file or directory\n"
