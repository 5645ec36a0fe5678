"""Long runs: does memory grow over thousands of training steps, or over adapters that come and go?

    python -m tests.torture memory --out FOLDER

Trains a small model for --steps steps, with calibration, checkpoints, logs and the splines' course, and adds and
deletes --cycles adapters. Resident memory and the bytes of all tensors alive are drawn over the run into
FOLDER/memory.png, with a straight line through what comes after the first quarter; FOLDER/memory.json has the numbers.
Exit code 1 if the tensors alive grow at all, or the resident memory by more than --tolerance of itself.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
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
from tests.tiny import make_tiny

MIB = 1 << 20
SAMPLES = 100


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
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = {"adapters": come_and_go(args.cycles), "steps": train(Path(folder), args.steps)}
    lines = {name: [fit(samples, column) for column in (1, 2)] for name, samples in found.items()}
    if args.out:
        write_whole(args.out / "memory.json", json.dumps(found) + "\n")
        with replacing(args.out / "memory.png") as part:
            draw(found, lines).savefig(part, dpi=130)
    return judge(found, lines, args.tolerance)


def memory():
    """Resident memory, and the bytes of all tensors that Python knows, in MiB."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    tensors = {o.data_ptr(): o.nbytes for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)}
    return resident / MIB, sum(tensors.values()) / MIB


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


def fit(samples, column):
    """A straight line through what comes after the first quarter."""
    late = samples[len(samples) // 4 :]
    return stats.linregress([sample[0] for sample in late], [sample[column] for sample in late])


def judge(found, lines, tolerance):
    code = 0
    for name, samples in found.items():
        late = samples[len(samples) // 4 :]
        resident, _ = lines[name]
        grown = resident.slope * (late[-1][0] - late[0][0])
        print(
            f"{samples[-1][0]} {name}: resident memory {late[0][1]:.1f} to {late[-1][1]:.1f} MiB, slope "
            f"{1000 * resident.slope:+.3f} ± {1960 * resident.stderr:.3f} MiB per 1,000; tensors alive "
            f"{late[0][2]:.4f} to {late[-1][2]:.4f} MiB"
        )
        if late[-1][2] > late[0][2] or grown > tolerance * late[0][1]:
            print(f"  {name}: memory grows")
            code = 1
    return code


def draw(found, lines):
    figure = Figure(figsize=(10, 6), layout="constrained")
    for row, (name, samples) in zip(figure.subplots(2, 2), found.items(), strict=True):
        places = [sample[0] for sample in samples]
        for axis, column, title in zip(row, (1, 2), ("resident memory", "tensors alive"), strict=True):
            axis.plot(places, [sample[column] for sample in samples], ".", markersize=4)
            line = lines[name][column - 1]
            late = places[len(places) // 4 :]
            axis.plot(late, [line.intercept + line.slope * x for x in late], linewidth=1.2)
            axis.set_ylim(0, 1.3 * max(sample[column] for sample in samples))
            axis.set_title(f"{title}, {1000 * line.slope:+.3f} MiB per 1,000 {name}", fontsize=9)
            axis.set_xlabel(name, fontsize=8)
            axis.set_ylabel("MiB", fontsize=8)
    return figure
