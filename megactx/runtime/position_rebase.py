"""Where entries and new tokens sit, once a history is longer than the base LM was trained for (method 8).

Positions that move cost a new reading of everything. So the last entry is put some way below the limit, new tokens go
on from there at their own spacing, and only when the limit is reached is all of it moved again.

    0 .. sink .. older, squeezed .. newest raw run |-- new tokens -->| limit
"""

import logging

import torch
from torch import Tensor

from megactx.memory import Selection, WorkingContext
from megactx.memory.pyramid import Bend

log = logging.getLogger(__name__)

AHEAD = 4  # of the limit, one part in so many is left for new tokens


class PositionRebase:
    """Positions of a window from one reading to the next.

    Args:
        kind: ``absolute`` or ``rebased``.
        limit: positions that the base takes.
        budget: entries of a window at most.
        step: tokens that are read behind a window at most.
    """

    def __init__(self, kind: str, limit: int, budget: int, step: int):
        self.kind, self.limit, self.step = kind, limit, step
        self.ahead = max(step, min(limit // AHEAD, limit - budget))
        # Of each row: where the last entry came to lie when it was moved, and tokens of the row then; None: never.
        self.moved: list[tuple[int, int] | None] = []
        self.warned = False

    def place(self, context: WorkingContext) -> tuple[Tensor, Tensor]:
        """-> positions of the entries [B, W], and of the first token behind each row [B]."""
        ends = context.ends()
        self.moved = self.moved or [None] * len(ends)
        limits = [self._below(row, end) for row, end in enumerate(ends.tolist())]
        positions = context.positions(limits[0])
        for limit in {*limits} - {limits[0]}:
            own = torch.tensor([limit == other for other in limits], device=ends.device)
            positions = torch.where(own[:, None], context.positions(limit), positions)
        largest = torch.tensor(
            [end if limit is None else limit for end, limit in zip(ends.tolist(), limits, strict=True)]
        )
        return positions, ends.minimum(largest.to(ends.device))

    def close(self, shown: Selection) -> tuple[Tensor, Tensor]:
        """The same for entries with gaps: but for absolute positions they follow on each other, however short the
        history is. A base LM that takes thousands of positions finds less the farther it is, and copies nothing from
        where it stood some thousand tokens ago.
        """
        if self.kind == "absolute":
            return shown.positions(), shown.ends()
        column = torch.arange(shown.lod.shape[1], device=shown.lod.device)
        return column.expand_as(shown.lod), shown.lengths

    def bends(self, shown: WorkingContext) -> tuple[list[Bend | None], Tensor]:
        """Where no edit may move a position -> of each row, ``None``: absolute; and the first behind it, [B]."""
        ends = shown.ends()
        self.moved = self.moved or [None] * len(ends)
        below = [self._below(row, end) for row, end in enumerate(ends.tolist())]
        bends = [None if moved is None else Bend(*moved) for moved in self.moved]
        return bends, torch.tensor([e if b is None else b for e, b in zip(ends.tolist(), below, strict=True)]).to(ends)

    def _below(self, row: int, tokens: int) -> int | None:
        """What the positions of a row are to stay below; ``None``: absolute."""
        if self.kind == "absolute" and tokens + self.step > self.limit and not self.warned:
            self.warned = True
            log.warning(
                "positions=absolute: the history goes past the %d positions that the base LM was trained on; what it"
                " writes there may be garbage. positions=rebased stays within them",
                self.limit,
            )
        if self.kind == "absolute" or tokens + self.step <= self.limit:
            self.moved[row] = None
            return None
        if (moved := self.moved[row]) is not None:
            below = moved[0] + tokens - moved[1]
            if moved[0] <= below <= self.limit - self.step:
                return below
        self.moved[row] = (self.limit - self.ahead, tokens)
        return self.limit - self.ahead
