"""Kill trainings with SIGKILL again and again; each must end with the very weights of one that was never killed.

    python -m tests.torture kill --runs 50

`train_lslora.py` trains a small model, with dropout, grids that are calibrated, and a checkpoint every other step.
Half of the kills come after an optimizer step, half after a file or folder in the output was opened, made or renamed,
each with a random delay. Then it goes on with --resume, or anew where no checkpoint is whole yet; up to three kills a
run. The triggers are drawn from all steps and file events of the reference run.
"""

import argparse
import collections
import contextlib
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
import trl  # noqa: F401
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm import tqdm

import lslora.callback
import lslora.report  # noqa: F401 - imported here, these and trl are there in every fork
from lslora.checkpoints import last_whole_checkpoint
from tests.tiny import make_tiny

sys.path.insert(0, str(Path(__file__).parents[2]))

import train_lslora

STEPS, SAVE_STEPS, CALIBRATION_STEPS = 12, 2, 5
FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
LONGEST_DELAY = {"step": 0.03, "file": 0.003}  # seconds; about a step, and about a file


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        return torture(Path(folder), args.runs, random.Random(args.seed))


def torture(folder, runs, dice):
    make_tiny(folder)
    events, code = train(folder, folder / "reference", resume=False)
    if code:
        print(f"the reference run ended with {code}")
        return 1
    print(f"reference: {sum(e.startswith('step') for e in events)} steps, {len(events)} events in all")
    moments, different = collections.Counter(), []
    for number in tqdm(range(runs), unit="run", disable=not sys.stderr.isatty()):
        output = folder / f"run-{number}"
        moments.update(run_with_kills(folder, output, dice.randint(1, 3), len(events), dice))
        if not same_weights(folder / "reference", output):
            different.append(number)
    for moment, count in sorted(moments.items()):
        print(f"{count:4} killed {moment}")
    print(f"{runs - len(different)} of {runs} runs with {moments.total()} kills end with the reference's weights")
    for number in different:
        print(f"run {number} does not")
    return 1 if different or not runs else 0


def run_with_kills(folder, output, kills, event_count, dice):
    """Train to the end over as many kills; yields the moments of the kills."""
    while True:
        resume = last_whole_checkpoint(output)[0] is not None
        steps = dice.random() < 0.5
        trigger = ("step", dice.randint(1, STEPS)) if steps else ("file", dice.randint(1, event_count - STEPS))
        if not kills:
            trigger = None
        delay = dice.uniform(0, LONGEST_DELAY["step" if steps else "file"])
        events, code = train(folder, output, resume, trigger, delay)
        if code == 0:  # it may have been through before the trigger: a resumed run has fewer steps and files
            return
        if code != -9:
            raise RuntimeError(f"{output}: ended with {code} after {events[-1:]}")
        kills -= 1
        yield moment(output, events)


def moment(output, events):
    """Where a kill came: by what was whole, or being written."""
    whole, problems = last_whole_checkpoint(output)
    if problems:
        return f"while writing a checkpoint, after: {events[-1].replace(str(output), '').lstrip('/')}"
    steps = sum(event.startswith("step") for event in events)
    if whole is None:
        return "before the first checkpoint, " + ("while calibrating" if steps else "before a step")
    if (output / "adapter_model.safetensors").exists():
        return "when the adapter was saved"
    return f"after {whole.name}"


def same_weights(expected, found):
    expected, found = (load_file(path / "adapter_model.safetensors") for path in (expected, found))
    return expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)


def train(folder, output, resume, trigger=None, delay=0.0):
    """Train in a process of its own, which dies `delay` seconds after the trigger; its events and exit code."""
    context = multiprocessing.get_context("fork")  # all is imported already
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(folder, output, resume, theirs))
    process.start()
    theirs.close()
    events, counts = [], collections.Counter()
    with contextlib.suppress(EOFError):
        while True:
            event = ours.recv()
            events.append(event)
            kind = event.partition(" ")[0]
            counts[kind] += 1
            if trigger == (kind, counts[kind]):
                time.sleep(delay)
                process.kill()
    process.join()
    return events, process.exitcode


def child(folder, output, resume, pipe):
    """Tell the parent of every step and of everything done to a file in the output, and train."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)

    def tell(event, arguments):
        if event in FILE_EVENTS and str(arguments[0]).startswith(str(output)):
            written = event != "open" or (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))
            if written:
                pipe.send(f"file {arguments[0]}")

    sys.addaudithook(tell)
    register_optimizer_step_post_hook(lambda *_: pipe.send("step"))
    arguments = ["--model_name", folder / "model", "--dataset_path", folder / "train.jsonl", "--output_dir", output]
    arguments += ["--max_steps", STEPS, "--save_steps", SAVE_STEPS, "--logging_steps", 1, "--learning_rate", 1e-2]
    arguments += ["--r", 2, "--calibration_steps", CALIBRATION_STEPS, "--spline_lr", 5e-2, "--quiet"]
    arguments += ["--resume"] if resume else []
    os._exit(train_lslora.main([str(argument) for argument in arguments]))
