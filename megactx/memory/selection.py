"""Selection: entries of a tree in the order of the text, with gaps. What is in a gap is not read at all.

    [ sink ]      [ 32 old tokens ]            [ newest tokens ]

A ``WorkingContext`` stands for every token of a history. A selection does not, so it has no edits: it is chosen anew.
"""

import torch
from torch import Tensor

from .working_context import WorkingContext


class Selection(WorkingContext):
    """Entries [B, W] that stand for tokens in ascending order, none of them twice; see ``WorkingContext``.

    Raises:
        ValueError: entries that overlap, are not in the tree or are protected, or more than ``budget``.
    """

    def check(self) -> None:
        if (self.counts > self.budget).any():
            raise ValueError(f"selection: {int(self.counts.max())} entries, the budget is {self.budget}")
        row, column = self.mask.nonzero().unbind(1)
        if not self.tree.usable(row, self.lod[row, column], self.index[row, column]).all():
            raise ValueError("selection: an entry is not in the tree, holds block 0 or is protected")
        starts = self.starts()
        behind = (starts + self.widths())[:, :-1] > starts[:, 1:]
        if (behind & self.mask[:, 1:]).any():
            raise ValueError("selection: an entry begins before the one to its left has ended")

    def ends(self) -> Tensor:
        """The token behind the last entry of each row, [B], counted through from the first of all."""
        return torch.where(self.mask, self.tree.rank(self.starts() + self.widths() - 1) + 1, 0).amax(1)
