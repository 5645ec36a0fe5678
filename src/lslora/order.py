"""Rows of similar length in one batch, in an order that a run which was stopped and goes on has as well."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class LengthGroupedOrder(LengthGroupedSampler):
    """transformers' sampler with an order that follows from the seed and the epoch alone.

    Its own draws from the global state of torch, another one when an epoch is resumed than when it began: the
    batches to skip would then be of another order, some rows would come twice and others never.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        super().__init__(sampler.batch_size, lengths=sampler.lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate as an epoch begins, also one that is resumed."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(super().__iter__())


class LengthGroupedOrderMixin:
    """Gives `transformers.Trainer`, and every trainer built on it, `LengthGroupedOrder` for `"group_by_length"`.

    Put it in front of the trainer's class. The seed is `data_seed` of the trainer's arguments, or else `seed`.
    """

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)  # type: ignore[misc]
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        settings = self.args  # type: ignore[attr-defined]
        return LengthGroupedOrder(sampler, settings.seed if settings.data_seed is None else settings.data_seed)
