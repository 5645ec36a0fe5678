"""Train on a file system that fills up: an error, and the last checkpoint and adapter are as they were.

    python -m tests.torture disk [--folder MOUNTED]

Without a folder, a tmpfs of a few MiB is mounted for the run (needs root). The reference run tells how much one
checkpoint takes; the room is then made so that it ends within each of several writes, at every try somewhere else.
"""

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from lslora.checkpoints import last_whole_checkpoint
from tests.tiny import make_tiny

sys.path.insert(0, str(Path(__file__).parents[2]))

import train_lslora

MIB = 1 << 20
TRIES = 8


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=TRIES)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        return fill_up(Path(folder), args.tries)


def fill_up(folder, tries):
    make_tiny(folder)
    code, told = train(folder, folder / "reference")
    if code:
        print(f"the reference run ended with {code}: {told}")
        return 1
    whole = size_of(folder / "reference")
    print(f"the whole run takes {whole / MIB:.2f} MiB")
    failed = 0
    for number in range(1, tries + 1):
        with mounted(folder / "small", MIB * 64) as small:
            room = whole * number // (tries + 1)
            filler = small / "filler"
            fill(filler, room)
            code, told = train(folder, small / "out")
            problem = problem_of(folder / "reference", small / "out", code, told)
            found, _ = last_whole_checkpoint(small / "out")
            print(f"{room / MIB:6.2f} MiB: exit code {code}, {found and found.name}: {told.strip().splitlines()[-1:]}")
            filler.unlink()
            if not problem:  # with room again it goes on to the same adapter
                code, told = train(folder, small / "out", *(["--resume"] if found else []))
                if code or not same(folder / "reference", small / "out"):
                    problem = f"went on to {code} {told}"
            if problem:
                failed += 1
                print(f"  {problem}")
    print(f"{tries - failed} of {tries} full disks told, with all that was whole still whole")
    return 1 if failed else 0


def problem_of(reference, output, code, told):
    """What is wrong after a full disk; None if nothing is."""
    *_, last = told.strip().splitlines()
    told_so = last.startswith(f"error: {output}") and re.search(
        "No space left on device|with [0-9]{1,5} bytes free", last
    )
    if code != 1 or not told_so or "Traceback" in told:
        return f"must end with 1 and a plain error, got {code}: {told}"
    checkpoints = sorted(path.name for path in output.glob("checkpoint-*"))
    found, problems = last_whole_checkpoint(output)
    if problems:
        return f"what could not be written must be gone, got {problems}"
    if found:
        expected = load_file(reference / found.name / "adapter_model.safetensors")
        if any(not torch.equal(t, expected[key]) for key, t in load_file(found / "adapter_model.safetensors").items()):
            return f"{found} of {checkpoints} is not the reference's"
    adapter = output / "adapter_model.safetensors"
    return None if not adapter.exists() or same(reference, output) else f"{adapter} is not the reference's"


def same(expected, found):
    expected, found = (load_file(path / "adapter_model.safetensors") for path in (expected, found))
    return expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)


@contextlib.contextmanager
def mounted(folder, size):
    """A file system of its own of this many bytes."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(path, room):
    """Leave only so many bytes free beside this file."""
    free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
    path.write_bytes(bytes(max(0, free - room)))


def size_of(folder):
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def train(folder, output, *more):
    """The exit code and what was told on stderr."""
    arguments = ["--model_name", folder / "model", "--dataset_path", folder / "train.jsonl", "--output_dir", output]
    arguments += ["--max_steps", 6, "--save_steps", 2, "--logging_steps", 1, "--r", 16, "--quiet", *more]
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        code = train_lslora.main([str(argument) for argument in arguments])
    return code, told.getvalue()
