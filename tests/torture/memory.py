"""Long runs: does memory grow over thousands of training steps, over adapters that come and go, or over many rows?

    python -m tests.torture memory --out FOLDER

Trains a small model for --steps steps, with calibration, checkpoints, logs and the splines' course, adds and deletes
--cycles adapters, and lets eval_lslora.py answer --rows rows in a process of its own, from the first it reads to the
results it writes. Resident memory and the bytes of all tensors alive (where the process is this one) are drawn over
the run into FOLDER/memory.png, with a straight line through what comes after the first quarter; FOLDER/memory.json has
the numbers. Exit code 1 if the tensors alive grow at all, or the resident memory by more than --tolerance of itself.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from peft import get_peft_model
from scipy import stats
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from lslora import LSLoraConfig, calibration
from lslora.callback import SplineCallback
from lslora.checkpoints import WholeCheckpointsMixin
from lslora.data import load_examples
from lslora.files import replacing, write_whole
from lslora.training import SplineTrainerMixin
from tests.tiny import ROWS, make_tiny

MIB = 1 << 20
SAMPLES = 100
TITLES = ("resident memory", "tensors alive")
ROOT = Path(__file__).parents[2]


class LongTrainer(SplineTrainerMixin, WholeCheckpointsMixin, SFTTrainer):
    pass


class Sampler(TrainerCallback):
    def __init__(self, every):
        self.every, self.samples = every, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self.samples.append((state.global_step, *memory()))


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "adapters": come_and_go(args.cycles),
            "steps": train(Path(folder), args.steps),
            "rows": answer(Path(folder), args.rows),
        }
    lines = {name: [fit(samples, column) for column in range(1, len(samples[0]))] for name, samples in found.items()}
    if args.out:
        write_whole(args.out / "memory.json", json.dumps(found) + "\n")
        with replacing(args.out / "memory.png") as part:
            draw(found, lines).savefig(part, dpi=130)
    return judge(found, lines, args.tolerance)


def memory():
    """Resident memory, and the bytes of all tensors that Python knows, in MiB."""
    gc.collect()
    tensors = {o.data_ptr(): o.nbytes for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)}
    return resident(os.getpid()), sum(tensors.values()) / MIB


def resident(process):
    """Resident memory of a process in MiB."""
    pages = Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / MIB


def train(folder, steps):
    make_tiny(folder)
    sampler = Sampler(max(1, steps // SAMPLES))
    trainer = LongTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        args=SFTConfig(
            str(folder / "out"), max_steps=steps, save_steps=steps // 10, save_total_limit=1, logging_steps=10,
            use_cpu=True, report_to="none", disable_tqdm=not sys.stderr.isatty(), learning_rate=1e-3,
        ),
        train_dataset=Dataset.from_list([dict(example) for example in load_examples(folder / "train.jsonl")]),
        peft_config=LSLoraConfig.recommended(r=4, calibration_steps=20, target_modules="all-linear"),
        callbacks=[SplineCallback(), sampler],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return sampler.samples


def come_and_go(cycles):
    """Adapters that are added, take part in a training step, and are deleted."""
    config = LSLoraConfig.recommended(r=4, calibration_steps=2, target_modules=["0", "2"])
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), config)
    samples = []
    for cycle in tqdm(range(1, cycles + 1), unit="adapter", disable=not sys.stderr.isatty()):
        model.add_adapter("guest", config)
        model.set_adapter("guest")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for _ in range(3):
            model(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        model.delete_adapter("guest")
        if cycle % max(1, cycles // SAMPLES) == 0:
            del optimizer
            samples.append((cycle, *memory()))
    if left := len(calibration._waiting) - 2:
        print(f"{left} deleted splines are still waiting for their calibration")
    return samples


def answer(folder, rows):
    """eval_lslora.py with the adapter that `train` left: resident memory over the rows answered, writing included."""
    data, output = folder / "many.jsonl", folder / "results.json"
    with data.open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = ROWS[number % len(ROWS)]
            file.write(json.dumps(row | {"input": "red " * (number % 7)}) + "\n")
    command = [
        sys.executable, str(ROOT / "eval_lslora.py"), "--adapter", str(folder / "out"), "--dataset", str(data),
        "--output", str(output), "--model_name", str(folder / "model"), "--quiet",
    ]  # fmt: skip
    partial = Path(f"{output}.partial.jsonl")
    samples, answered, place = [], 0, 0
    with subprocess.Popen(command, cwd=ROOT) as process:
        while process.poll() is None:
            time.sleep(0.25)
            with (
                suppress(OSError),
                partial.open("rb") as file,
            ):  # it is not there before the first row and after the last
                file.seek(place)
                added = file.read()
                place, answered = place + len(added), answered + added.count(b"\n")
            if answered > 1 and (held := resident(process.pid)):  # 0 when the process has just ended
                samples.append((answered - 1, held))
    if process.returncode or json.loads(output.read_text(encoding="utf-8"))["summary"]["micro"]["n"] != rows:
        raise RuntimeError(f"eval_lslora.py did not answer all rows, exit code {process.returncode}")
    return samples


def fit(samples, column):
    """A straight line through what comes after the first quarter."""
    late = later(samples)
    return stats.linregress([sample[0] for sample in late], [sample[column] for sample in late])


def later(samples):
    return samples[len(samples) // 4 :]


def judge(found, lines, tolerance):
    code = 0
    for name, samples in found.items():
        late = later(samples)
        (x, first, *tensors), (end, last, *tensors_last), line = late[0], late[-1], lines[name][0]
        alive = f"; tensors alive {tensors[0]:.4f} to {tensors_last[0]:.4f} MiB" if tensors else ""
        print(
            f"{end} {name}: resident memory {first:.1f} to {last:.1f} MiB, slope "
            f"{1000 * line.slope:+.3f} ± {1960 * line.stderr:.3f} MiB per 1,000{alive}"
        )
        if tensors_last > tensors or line.slope * (end - x) > tolerance * first:
            print(f"  {name}: memory grows")
            code = 1
    return code


def draw(found, lines):
    figure = Figure(figsize=(10, 9), layout="constrained")
    for row, (name, samples) in zip(figure.subplots(len(found), 2), found.items(), strict=True):
        places = [sample[0] for sample in samples]
        row[-1].set_visible(len(lines[name]) > 1)
        for axis, column, title in zip(row, range(1, len(lines[name]) + 1), TITLES, strict=False):
            axis.plot(places, [sample[column] for sample in samples], ".", markersize=4)
            line = lines[name][column - 1]
            late = later(places)
            axis.plot(late, [line.intercept + line.slope * x for x in late], linewidth=1.2)
            axis.set_ylim(0, 1.3 * max(sample[column] for sample in samples))
            axis.set_title(f"{title}, {1000 * line.slope:+.3f} MiB per 1,000 {name}", fontsize=9)
            axis.set_xlabel(name, fontsize=8)
            axis.set_ylabel("MiB", fontsize=8)
    return figure
