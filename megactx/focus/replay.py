"""What happened at each refocus of a session, kept so that it can be looked at.

    replay = Replay()
    replay.refocus(allocator, context, scores.score, scores.price)     # instead of allocator.refocus(context, ...)

B rows, W entries, E edits.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megactx.memory import Composite, WorkingContext

from .allocator import FocusAllocator
from .edits import Edits


@dataclass(frozen=True)
class View:
    """One row of a working context at one moment, on the CPU, without padding."""

    lod: Tensor  # [W]
    index: Tensor  # [W]
    block_size: int  # K
    # Of a window of several trees, in their order: (name, address of the first token, tokens, licence); the name
    # of the history is "".
    parts: tuple[tuple[str, int, int, str], ...] = ()

    @classmethod
    def of(cls, context: WorkingContext, row: int) -> "View":
        """A copy of a row."""
        count = int(context.counts[row])
        lod, index = (values[row, :count].cpu().clone() for values in (context.lod, context.index))
        tree, parts = context.tree, ()
        if isinstance(tree, Composite):
            names = [tree.name_of(number) or "" for number in range(len(tree.trees))]
            tokens = [int((tree.block_size**own).sum()) for own, _ in tree.segments(context)]
            licences = [*(part.licence for part in tree.parts), ""]
            parts = tuple(zip(names, tree.bases, tokens, licences, strict=True))
        return cls(lod, index, tree.block_size, parts)

    @property
    def width(self) -> Tensor:
        """Tokens that each entry stands for, [W]."""
        return self.block_size**self.lod

    @property
    def start(self) -> Tensor:
        """First token of each entry, [W]: its address, where there are parts."""
        return self.index * self.width

    @property
    def tokens(self) -> int:
        """Tokens that the whole window stands for."""
        return int(self.width.sum())


@dataclass(frozen=True)
class Step:
    """One refocus."""

    before: View
    score: Tensor  # [W] of ``before``, from -1 (collapse) to 1 (expand)
    threshold: float  # of scores: what is closer to 0 stays as it is
    price: float | None  # nats; what detail cost at that time
    edits: Edits  # made, in their order
    after: View


@dataclass
class Replay:
    """The refocuses of one row of a session, from the first to the last.

    Args:
        row: of the batch; only this one is kept.
    """

    row: int = 0
    steps: list[Step] = field(default_factory=list)

    def refocus(
        self, allocator: FocusAllocator, context: WorkingContext, score: Tensor, price: Tensor | None = None
    ) -> Edits:
        """Call ``allocator.refocus(context, score, price)``, and remember what it did to the row.

        Raises:
            ValueError: there is no such row; and the errors of the allocator.
        """
        if not 0 <= self.row < len(context.counts):
            raise ValueError(f"row={self.row} is not allowed: 0 to {len(context.counts) - 1}")
        before = View.of(context, self.row)
        edits = allocator.refocus(context, score, price)
        own = edits[edits.row == self.row]
        self.steps.append(
            Step(
                before=before,
                score=score[self.row, : len(before.lod)].detach().float().cpu().clone(),
                threshold=allocator.threshold,
                price=None if price is None else float(price[self.row]),
                edits=Edits(own.row.cpu(), own.lod.cpu(), own.index.cpu(), own.expand.cpu()),
                after=View.of(context, self.row),
            )
        )
        return edits

    @property
    def views(self) -> list[View]:
        """The window before the first refocus, and after each."""
        return [self.steps[0].before, *(step.after for step in self.steps)] if self.steps else []

    @property
    def tokens(self) -> int:
        """The most that any of the windows stands for."""
        return max((view.tokens for view in self.views), default=0)

    @property
    def depth(self) -> int:
        """The highest LOD that was in any of the windows."""
        return max((int(torch.max(view.lod)) for view in self.views), default=0)
