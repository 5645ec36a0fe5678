"""Ctrl-C and SIGTERM end a training after its current step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ONE_WISH = 2.0  # seconds; a launcher passes on what the terminal has sent to all processes already


class StopOnSignal(TrainerCallback):
    """While it is entered, a first SIGINT or SIGTERM stops the trainer, after a checkpoint; a later one acts as ever.

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
        self._came = 0.0

    def __enter__(self) -> StopOnSignal:
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as shells ask for
        self._before = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._came = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._came > ONE_WISH:
            self.__exit__()
            os.kill(os.getpid(), number)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if distributed.is_available() and distributed.is_initialized():
            number = torch.tensor(self.signal or 0, device=args.device)
            distributed.all_reduce(number, op=distributed.ReduceOp.MAX)
            if number.item():
                self.signal = signal.Signals(int(number.item()))
        if self.signal:
            if args.save_total_limit == 1:  # for which transformers ends by removing all but the best checkpoint
                args.save_total_limit = 2
            control.should_save = True
            control.should_training_stop = True
