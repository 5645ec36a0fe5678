"""What is one more function a layer worth on a finished LoRA?

    python -m benchmarks.worth --data FOLDER [--r 4] [--lr 4e-3]

A LoRA is trained as in plan `math`, seed 0, and trained on, for as many steps on other rows: first with A and B
frozen, the function alone learning in one place after the other, then together with A and B.
"""

from __future__ import annotations

import argparse
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import tensor
from transformers import set_seed

from .elsewhere import attach_deltas
from .methods import attach
from .quality import read_plan
from .runs import Bench, Run, train
from .tasks import evaluate

PLAN = Path(__file__).parent / "plans" / "math.toml"
LORA = {"kind": "lora", "alpha_ratio": 10}
OTHER_ROWS = 100  # a seed
FUNCTION_LR = 2e-2  # of a function, whose numbers are of order one
LORA_LR = 1e-3
FUNCTIONS = {  # place, knots
    "scalar": ("token", 1),
    "output": ("output", 9),
    "bottleneck": ("bottleneck", 9),
    "token": ("token", 17),
    "gate": ("gate", 9),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("."), help="folder that the plan's paths start from")
    parser.add_argument("--r", type=int, default=4)
    parser.add_argument("--lr", type=float, default=4e-3, help="of the LoRA that is finished first")
    args = parser.parse_args(argv)
    setting, _ = read_plan(PLAN)
    bench = Bench(setting, args.data)

    def trained_on(model: Any, lr: float, seed: int, ratio: float = 1.0) -> dict[str, Any]:
        train(model, Run("", LORA | {"spline_lr_ratio": ratio}, args.r, lr, seed), setting, bench.train)
        return evaluate(model, bench.measured["validation"])

    set_seed(0)
    lora = attach(deepcopy(bench.model), LORA, args.r)
    finished = trained_on(lora, args.lr, seed=0)
    print(f"LoRA, r = {args.r}, {args.lr:g}: nll {finished['nll']:.4f}", flush=True)
    for name, function in FUNCTIONS.items():
        model = deepcopy(lora).requires_grad_(False)
        attach_deltas(model, *function, waits=1)
        tell(f"{name} alone", trained_on(model, FUNCTION_LR, OTHER_ROWS), finished)
    tell("A and B", trained_on(deepcopy(lora), LORA_LR, OTHER_ROWS), finished)
    model = deepcopy(lora)
    attach_deltas(model, *FUNCTIONS["output"], waits=1)
    tell("A, B and output", trained_on(model, LORA_LR, OTHER_ROWS, FUNCTION_LR / LORA_LR), finished)
    return 0


def tell(name: str, found: dict[str, Any], before: dict[str, Any]) -> None:
    """The nll and its change, with the standard error over rows."""
    change = tensor(found["row_nll"]) - tensor(before["row_nll"])
    error = change.std().item() * len(change) ** 0.5 / sum(found["row_tokens"])
    print(f"{name}: nll {found['nll']:.4f} ({found['nll'] - before['nll']:+.4f} ± {error:.4f})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
