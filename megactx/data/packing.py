"""Batches of conversations: several in a row, each with positions of its own and attention to itself alone."""

from bisect import bisect_left, insort

import numpy as np

from .documents import TRAIN, Views
from .resumable import Endless
from .turns import unmarked


class ConversationBatches(Endless):
    """Map-style dataset of whole batches. Batch ``i`` is a function of (seed, i) alone.

    Which conversations share a row is decided once, so that little is left empty. In an epoch every row comes once, in
    an order of the epoch's own.

    Args:
        rows: as ``tokenised_conversations`` returns them, none longer than ``tokens``.
        tokens: T of a row.
        batch: B, rows.
        padding: id of what is left empty.

    Each item is a dict of int64 arrays ``ids``, ``positions``, ``conversation`` [B, T] (its number in the row; -1 is
    padding) and ``answers`` bool [B, T] (the token is part of an answer: it carries loss).
    """

    def __init__(self, rows, tokens: int, batch: int, padding: int, seed: int, split: str = TRAIN):
        self.tokens, self.batch, self.padding, self.seed = tokens, batch, padding, seed
        chosen = [side == split for side in rows.data.column("split").to_pylist()]
        self.texts = [ids for ids, taken in zip(Views(rows), chosen, strict=True) if taken]
        if not self.texts:
            raise ValueError(f"conversations: none is on the {split} side of the split; give more of them")
        order = np.random.default_rng([seed, 0]).permutation(len(self.texts))
        self.packs = packed([len(self.texts[index]) for index in order], tokens)
        self.packs = [[int(order[index]) for index in pack] for pack in self.packs]

    def __getitem__(self, index: int) -> dict:
        first = index * self.batch
        rows = [self._row(self._pack(number)) for number in range(first, first + self.batch)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def whole(self) -> int:
        """Batches that hold every conversation once; the last may begin a second epoch."""
        return -(-len(self.packs) // self.batch)

    def _pack(self, number: int) -> list[int]:
        epoch, place = divmod(number, len(self.packs))
        return self.packs[np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.packs))[place]]

    def _row(self, pack: list[int]) -> dict:
        row = {
            "ids": np.full(self.tokens, self.padding, dtype=np.int64),
            "positions": np.zeros(self.tokens, dtype=np.int64),
            "conversation": np.full(self.tokens, -1, dtype=np.int64),
            "answers": np.zeros(self.tokens, dtype=bool),
        }
        start = 0
        for number, text in enumerate(pack):
            ids, answers = unmarked(np.asarray(self.texts[text]))
            here = slice(start, start + len(ids))
            row["ids"][here], row["answers"][here] = ids, answers
            row["positions"][here], row["conversation"][here] = np.arange(len(ids)), number
            start += len(ids)
        row["positions"][start:] = np.arange(self.tokens - start)  # padding is one more conversation, of no loss
        return row


def packed(lengths: list[int], room: int) -> list[list[int]]:
    """Indices of lengths, in lists whose sums are at most ``room``: the longest first, each where it fits best."""
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens that are left, pack), ascending
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(free, (lengths[index], -1))
        if place == len(free):
            left, pack = room, len(packs)
            packs.append([])
        else:
            left, pack = free.pop(place)
        packs[pack].append(index)
        insort(free, (left - lengths[index], pack))
    return packs
