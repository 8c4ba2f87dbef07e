"""Batches that several processes share, and that a resumed run goes on with at the exact one."""

from collections.abc import Callable

import lightning
import torch
from torch.utils.data import DataLoader, Dataset


class Endless(Dataset):
    """Batch i, for ever: a subclass says what it is, or a function of i."""

    def __init__(self, draw: Callable[[int], object]):
        self.draw = draw

    def __len__(self) -> int:
        return 2**31  # without an end Lightning never prefetches past one

    def __getitem__(self, index: int):
        return self.draw(index)


class Resumable(lightning.LightningDataModule):
    """A DataModule whose training batch i is a function of (seed, i), and whose validation has a fixed order.

    i counts the batches of all processes: process r of w is served r, r + w, r + 2 w, ..., so that two processes train
    on what one process with twice the accumulation does. What is saved is how many were served in all.
    """

    def __init__(self):
        super().__init__()
        self.served = 0  # batches of all processes before this run goes on
        self._since = 0  # batches of this process by then

    @property
    def each(self) -> int:
        """Batches of a step: accumulated ones, of all processes."""
        return self.trainer.accumulate_grad_batches * self.trainer.world_size if self.trainer else 1

    def indices(self) -> "CountFrom":
        """Indices of the training batches of this process, without end."""
        rank, count = self._place()
        return CountFrom(self.served + rank, count)

    def loader(self, batches, **settings) -> DataLoader:
        """A loader of ready batches, with a generator of its own: the run's random state is not drawn from."""
        return DataLoader(batches, batch_size=None, generator=torch.Generator().manual_seed(self.seed), **settings)

    def share(self, items: int, setting: str) -> range:
        """Indices of this process among ``items`` validation items, each in one process only.

        Raises:
            ValueError: there are fewer items than processes; it names the setting that says how many.
        """
        rank, count = self._place()
        if items < count:
            raise ValueError(f"{setting}: {items} are too few for {count} processes, each needs one")
        return range(rank, items, count)

    def state_dict(self) -> dict:
        if self.trainer is None:
            return {"served": self.served, "batches": self._since}
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        return {"served": self.served + (batches - self._since) * self._place()[1], "batches": batches}

    def load_state_dict(self, state: dict) -> None:
        self.served = int(state["served"])
        self._since = int(state.get("batches", self.served))

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


class CountFrom:
    """A sampler that counts up from ``start`` by ``step``; its length has no end that a run would reach."""

    def __init__(self, start: int, step: int = 1):
        self.start, self.step = start, step

    def __iter__(self):
        return iter(range(self.start, 2**31, self.step))

    def __len__(self) -> int:
        return 2**31
