"""The same training on one process and on two, on CPU: plain, DDP, FSDP 1 with peft's wrapping policy, FSDP 2, and
DeepSpeed's ZeRO-2 and ZeRO-3.

    python scripts/several_processes.py

prints the losses of every step side by side, then those of going on alone from what two processes saved. Every step
takes the same global batch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from lslora import LSLoraConfig
from lslora.calibration import count_step
from lslora.diagnostics import spline_metrics
from lslora.spline import splines_of
from lslora.training import prepare_for_deepspeed, separate_spline_group

ENGINES = ("alone", "ddp", "fsdp1", "fsdp2", "zero2", "zero3")
STEPS, GLOBAL_BATCH, TOKENS = 6, 8, 7
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def base() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, initializer_range=0.2, **SIZES))


def fresh(placement: str = "output") -> Any:
    model = base()
    torch.manual_seed(1)
    settings = {"r": 2, "target_modules": "all-linear", "init_lora_weights": "orthogonal", "spline_reg_weight": 1.0}
    return get_peft_model(model, LSLoraConfig(**settings, placement=placement, calibration_steps=2))


def sharded_by_fsdp2(model: nn.Module) -> nn.Module:
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


WRAP = {
    "ddp": DistributedDataParallel,
    "fsdp1": lambda model: FullyShardedDataParallel(
        model, auto_wrap_policy=fsdp_auto_wrap_policy(model), use_orig_params=True, device_id=torch.device("cpu")
    ),
    "fsdp2": sharded_by_fsdp2,
}


def batch(step: int) -> torch.Tensor:
    """This process's rows of the step's global batch."""
    rows = torch.randint(0, 32, (GLOBAL_BATCH, TOKENS), generator=torch.Generator().manual_seed(step))
    if not distributed.is_initialized():
        return rows
    return rows[distributed.get_rank() :: distributed.get_world_size()]


class Loop:
    """A training loop's parts: the wrapped model, and what a backward pass and a step are with it."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def backward_and_step(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class DeepSpeedLoop(Loop):
    """The same with DeepSpeed's engine."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, stage: int) -> None:
        import deepspeed

        prepare_for_deepspeed(model)
        config = {
            "train_micro_batch_size_per_gpu": GLOBAL_BATCH // 2,
            "zero_optimization": {"stage": stage},
            "gradient_clipping": 0.0,
            # With these, the step is the optimizer's own.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        super().__init__(engine, optimizer)

    def backward_and_step(self, loss: torch.Tensor) -> None:
        self.model.backward(loss)
        self.model.step()
        count_step(splines_of(self.model))


def loop(engine: str, placement: str) -> Loop:
    """A fresh model and its optimizer, wrapped; `alone` is one process without a wrapper."""
    model = fresh(placement)
    if engine in WRAP:
        model = WRAP[engine](model)
    optimizer = make_optimizer(model)
    return DeepSpeedLoop(model, optimizer, int(engine[-1])) if engine.startswith("zero") else Loop(model, optimizer)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # Not Adam: where a gradient is zero but for rounding, it would make a whole step of the rounding.
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
    separate_spline_group(optimizer, model, lr=1.0)
    return optimizer


def train(loop: Loop, steps: range) -> list[float]:
    """The mean loss over all processes at every step."""
    losses = []
    for step in steps:
        ids = batch(step)
        logits = loop.model(ids).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loop.backward_and_step(loss)
        mean = loss.detach()
        if distributed.is_initialized():
            distributed.all_reduce(mean)
            mean = mean / distributed.get_world_size()
        losses.append(mean.item())
    return losses


def work(engine: str, folder: Path, placement: str) -> None:
    """One process: train, save the adapter, note the losses and the splines' state."""
    if engine != "alone":
        distributed.init_process_group("gloo")
    found = loop(engine, placement)
    losses = train(found, range(STEPS))
    metrics = spline_metrics(found.model)
    tensors = whole_state(found.model, engine)
    if engine == "alone" or distributed.get_rank() == 0:
        # Through a model that was never wrapped: peft finds no adapter in one that FSDP 1 wrapped layer by layer.
        fresh(placement).save_pretrained(folder, state_dict=tensors)
        record = {"losses": losses, "metrics": metrics}
        (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    if engine != "alone":
        distributed.destroy_process_group()


def whole_state(model: nn.Module, engine: str) -> dict[str, torch.Tensor]:
    """All of the model's tensors, gathered, under the names of the model that was not wrapped."""
    if engine.startswith("zero"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            named = [*model.module.named_parameters(), *model.module.named_buffers()]
            return {name: t.detach().clone() for name, t in named}
    if engine == "fsdp1":  # its own state_dict ends in a segmentation fault on CPU (torch 2.13, plain LoRA too)
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            named = [*model.named_parameters(), *model.named_buffers()]
            return {name.replace("_fsdp_wrapped_module.", ""): t.detach().clone() for name, t in named}
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def go_on(folder: Path) -> list[float]:
    """Losses of two more steps on one process, from a saved adapter."""
    model = PeftModel.from_pretrained(base(), folder, is_trainable=True)
    return train(Loop(model, make_optimizer(model)), range(STEPS, STEPS + 2))


def run(engine: str, folder: Path, placement: str = "output") -> dict[str, Any]:
    """Train with `engine`, on two processes unless alone, in processes of their own; the record, with `go_on`."""
    folder.mkdir(parents=True, exist_ok=True)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if engine != "alone" else []
    command = [sys.executable, *launch, __file__, "--worker", engine, str(folder), placement]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{engine} failed:\n{done.stderr[-4000:]}")
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    return record | {"go_on": go_on(folder)}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        records = {engine: run(engine, Path(folder) / engine) for engine in ENGINES}
    print("step    " + "".join(f"{engine:>12}" for engine in ENGINES))
    for step in range(STEPS):
        print(f"{step:<8}" + "".join(f"{records[engine]['losses'][step]:12.7f}" for engine in ENGINES))
    for step in range(2):
        print(f"{STEPS + step}, alone" + "".join(f"{records[engine]['go_on'][step]:12.7f}" for engine in ENGINES))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], Path(sys.argv[3]), sys.argv[4])
    else:
        main()
