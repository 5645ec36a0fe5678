"""The page about a training: what it says, that it needs no network, and how a browser shows it."""

import base64
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.image import imread

from lslora.callback import COURSE, DIAGNOSTICS
from lslora.checkpoints import seal
from lslora.records import save_records
from lslora.report import main, write_report
from lslora.scoring import compare, summarize
from tests.test_plots import blocks

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DENSITY = [0.02, 0.08, 0.4, 0.4, 0.08, 0.02]


def answers(right):
    fields = {"task": "boolq", "answer": "true"}
    return [{"index": i, "prediction": "true", "correct": i < right, **fields} for i in range(10)]


@pytest.fixture
def folder(tmp_path):
    """An output folder as a run leaves it."""
    made = tmp_path / "my <run>"
    made.mkdir()
    log = [{"step": s, "loss": 2.0 / s, "learning_rate": 1e-3 / s, "grad_norm": 1.0} for s in range(1, 6)]
    state = {"global_step": 5, "log_history": [*log, {"step": 5, "train_loss": 1.0}]}
    (made / "trainer_state.json").write_text(json.dumps(state))
    base, ours = answers(4), answers(9)
    run = {
        "settings": {"method": "lslora", "model_name": "m", "dataset_path": "<script>alert(1)</script>", "r": 16},
        "versions": {"peft": "0.21.2"},
        "accuracy": {"base": summarize(base), "lslora": summarize(ours)},
        "comparison": compare(base, ours),
    }
    (made / "run.json").write_text(json.dumps(run))
    records = blocks(4, density=DENSITY, occupancy=[0.0, 0.005, 0.395, 0.6, 0.0, 0.0])
    save_records(records, made / DIAGNOSTICS)
    course = [{"step": s, "layers": {r["layer"]: [0.01 * s, 0.0] for r in records}} for s in range(1, 6)]
    (made / COURSE).write_text("".join(json.dumps(entry) + "\n" for entry in course))
    return made


def pictures_of(page):
    """Every picture of the page, as an array (height, width, 4)."""
    found = re.findall(r'<figure id="(\w+)"><img src="data:image/png;base64,([^"]+)"', page)
    return {name: imread(io.BytesIO(base64.b64decode(data)), format="png") for name, data in found}


def test_the_page_says_what_the_run_left(folder, capsys):
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    page = (folder / "report.html").read_text()
    pictures = pictures_of(page)
    assert list(pictures) == ["training", "accuracy", "splines", "deviations", "heatmap", "occupancy", "course"]
    assert all(picture[..., :3].std() > 0.01 for picture in pictures.values())
    assert "<h1>my &lt;run&gt;</h1>" in page and "<script>" not in page and "&lt;script&gt;" in page
    assert "<b>2.0000 → 0.4000</b> training loss" in page
    assert "<b>40.0 %</b> accuracy, base" in page and "<b>90.0 %</b> accuracy, lslora" in page
    assert "+50.00 [" in page and "McNemar" in page
    assert "<b>50 %</b> of the intervals live" in page
    assert "2 identity, 6 learning." in page  # the middle of five knots off by 0.1 a block
    assert page.index("<td>model.layers.3.self_attn.q_proj</td><td>0.0600</td>") < page.index("layers.0.self_attn")
    assert "peft 0.21.2" in page


def test_the_page_needs_no_network(folder):
    page = write_report(folder).read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 7 and all(source.startswith("data:") for source in sources)
    assert "http" not in page and "url(" not in page


def test_what_is_not_there_is_said(folder, tmp_path):
    for name in ("run.json", DIAGNOSTICS, COURSE):
        (folder / name).unlink()
    (folder / "checkpoint-5").mkdir()
    (folder / "trainer_state.json").rename(folder / "checkpoint-5" / "trainer_state.json")
    page = write_report(folder, tmp_path / "else.html").read_text()
    assert list(pictures_of(page)) == ["training"]
    for sentence in ("answered no questions", "left no records of splines.", "left no settings"):
        assert sentence in page


@pytest.mark.parametrize("this_run", [True, False])
def test_a_finished_run_that_went_on_and_was_stopped_is_shown_as_far_as_it_came(folder, this_run):
    state = json.loads((folder / "trainer_state.json").read_text())
    last = folder / f"checkpoint-{state['global_step'] + 5}"
    last.mkdir()
    state["global_step"] += 5
    state["log_history"].append({"loss": 0.1234, "step": state["global_step"]})
    (last / "trainer_state.json").write_text(json.dumps(state))
    if this_run:  # what an earlier run left in the folder has no seal
        seal(last)
    assert ("→ 0.1234</b> training loss" in write_report(folder).read_text()) is this_run


def test_a_new_run_that_was_stopped_is_not_taken_for_the_one_before(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").unlink()  # as a new run does
    for step, loss in ((900, 0.9), (4, 0.4)):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir()
        log = [*state["log_history"], {"loss": loss, "step": step}]
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
    with pytest.raises(ValueError, match="found neither"):  # nothing was saved yet
        write_report(folder)
    seal(folder / "checkpoint-4")
    assert "→ 0.4000</b> training loss" in write_report(folder).read_text()


def test_splines_of_an_earlier_run_are_not_shown(folder):
    run = json.loads((folder / "run.json").read_text())
    run["settings"]["method"] = "lora"
    (folder / "run.json").write_text(json.dumps(run))
    page = write_report(folder).read_text()
    assert list(pictures_of(page)) == ["training", "accuracy"]
    assert "left no records of splines: it trained plain LoRA." in page


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("trainer_state.json", None, "must be the output folder of a training"),
        ("trainer_state.json", "{", "trainer_state.json must be JSON"),
        ("run.json", "[1]", "run.json must hold a JSON object, got list"),
        ("run.json", '{"settings": null}', "run.json must be a file that train_lslora.py wrote"),
        ("run.json", '{"settings": [1], "versions": {}}', "run.json must be a file that train_lslora.py wrote"),
        ("run.json", '{"settings": {"method": "lora"}, "versions": {}}', "must be a file that train_lslora.py wrote"),
        (DIAGNOSTICS, '{"layers": [{}]}', f"{DIAGNOSTICS} must be a file that save_records wrote"),
        (DIAGNOSTICS, "{}", f"{DIAGNOSTICS} must be a file that save_records wrote"),
        (COURSE, "{}\n", f"{COURSE} must be a file that SplineCallback wrote"),
    ],
)
def test_folders_that_cannot_be_used(folder, capsys, name, content, message):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    assert main([str(folder)]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "report.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_the_pictures(folder, tmp_path):
    """A screenshot of the page holds, pixel for pixel, every picture that is not scaled down to the page's width."""
    path = write_report(folder)
    shot = tmp_path / "shot.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,4500", f"--screenshot={shot}"]
    subprocess.run([CHROMIUM, *flags, path.as_uri()], check=True, capture_output=True, timeout=120)
    shown = imread(shot)[..., :3]
    whole = {n: picture for n, picture in pictures_of(path.read_text()).items() if picture.shape[1] <= 900}
    assert len(whole) >= 5
    for name, picture in whole.items():
        assert found_in(shown, picture[..., :3]), name


def found_in(page, picture):
    """Whether the picture stands somewhere on the page; looked for by its row with the most contrast."""
    row = int(picture.std(axis=(1, 2)).argmax())
    width = picture.shape[1]
    for left in range(page.shape[1] - width + 1):
        places = np.flatnonzero(np.abs(page[:, left : left + width] - picture[row]).max(axis=(1, 2)) < 0.02)
        for top in places - row:
            if top >= 0 and np.abs(page[top : top + len(picture), left : left + width] - picture).max() < 0.02:
                return True
    return False
