"""Ctrl-C and SIGTERM end a training after its current step, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(TrainerCallback):
    """While it is entered, the first SIGINT or SIGTERM stops the trainer, after a checkpoint; the second acts as ever.

        with StopOnSignal() as stop:
            trainer.add_callback(stop)
            trainer.train()

    Of several processes all stop after the same step, whichever of them had the signal.

    Attributes:
        signal: Which one came, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as shells ask for
        self._before = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self.__exit__()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if distributed.is_available() and distributed.is_initialized():
            number = torch.tensor(self.signal or 0, device=args.device)
            distributed.all_reduce(number, op=distributed.ReduceOp.MAX)
            if number.item():
                self.signal = signal.Signals(int(number.item()))
        if self.signal:
            control.should_save = True
            control.should_training_stop = True
