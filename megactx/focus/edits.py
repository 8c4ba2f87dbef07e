"""What may be changed in a working context, and a change of it (method 10, 11).

A gist of the window can be *expanded* into its K children. K siblings that all stand in the window can be *collapsed*
into their parent. An expand is named by the gist that goes, a collapse by the gist that comes. So an edit and its
undoing have one name.

B rows, W entries, K children of a node, E edits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megactx.memory import WorkingContext

PROTECTED = 128  # newest tokens that are never collapsed (method 11)


@dataclass(frozen=True)
class Edits:
    """E edits: each expands gist (lod, index) of row ``row``, or collapses its children into it."""

    row: Tensor  # [E]
    lod: Tensor  # [E], at least 1
    index: Tensor  # [E]
    expand: Tensor  # [E], bool

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, which) -> "Edits":
        """Some of them: a slice, a mask [E] or places [M]."""
        return Edits(self.row[which], self.lod[which], self.index[which], self.expand[which])

    def cost(self, block_size: int) -> Tensor:
        """Entries that each adds to its row, [E]."""
        return torch.where(self.expand, block_size - 1, 1 - block_size)

    def apply(self, context: WorkingContext) -> None:
        """Make all edits, in this order within each row. No two may concern the same entries.

        Raises:
            ValueError: an edit is illegal when its turn comes. The edits before it are made.
        """
        order = torch.argsort(self.row, stable=True)
        row = self.row[order]
        turn = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)  # place in its row
        for step in range(int(turn.max()) + 1 if len(row) else 0):
            now = self[order[turn == step]]
            if len(part := now[~now.expand]):
                context.collapse(part.lod, part.index, part.row)
            if len(part := now[now.expand]):
                column = column_of(context, part.row, part.lod, part.index)
                at = column.clamp(max=context.lod.shape[1] - 1)
                same = (context.lod[part.row, at] == part.lod) & (context.index[part.row, at] == part.index)
                same &= context.mask[part.row, at]
                if not same.all():
                    wrong = part[~same]
                    raise ValueError(
                        f"expand: gist (lod {int(wrong.lod[0])}, index {int(wrong.index[0])}) is not in row"
                        f" {int(wrong.row[0])}"
                    )
                context.expand(column, part.row)


@dataclass(frozen=True)
class Moves:
    """What is legal in each row of a working context."""

    expand: Tensor  # [B, W] bool: a gist, whose children may take its place
    first: Tensor  # [B, W]: column of the first of the entry's K siblings, if they may collapse; else -1

    @property
    def leads(self) -> Tensor:
        """The first entry of each sibling set that may collapse, bool [B, W]."""
        return self.first == torch.arange(self.first.shape[1], device=self.first.device)

    def edits(self, context: WorkingContext) -> Edits:
        """All legal edits: expands first, then collapses, both in the order of rows and columns."""
        opened, leads = self.expand.nonzero(), self.leads.nonzero()
        row, column = torch.cat([opened, leads]).unbind(1)
        lod, index = context.lod[row, column], context.index[row, column]
        expand = torch.arange(len(row), device=row.device) < len(opened)
        lod, index = torch.where(expand, lod, lod + 1), torch.where(expand, index, index // context.tree.block_size)
        return Edits(row, lod, index, expand)


def moves(context: WorkingContext, protected: int = PROTECTED) -> Moves:
    """What may be changed: any gist may be expanded; K siblings collapse where the parent may stand in a window.

    Args:
        protected: newest tokens of each row that do not collapse.
    """
    lod, index, mask, k = context.lod, context.index, context.mask, context.tree.block_size
    b, w = lod.shape
    column = torch.arange(w, device=lod.device)
    # Entries leave no gap within a tree. So if the first and the last of K siblings stand K - 1 columns apart, the
    # others stand between.
    last = (column + k - 1).clamp(max=w - 1).expand(b, w)
    whole = mask & (column + k <= w) & mask.gather(1, last) & (index % k == 0)
    whole &= (lod.gather(1, last) == lod) & (index.gather(1, last) == index + k - 1)
    end = (index + k) * context.widths()
    whole &= end <= (context.stops() - protected)[:, None]
    row, lead = whole.nonzero().unbind(1)
    legal = context.tree.usable(row, lod[row, lead] + 1, index[row, lead] // k)
    row, lead = row[legal], lead[legal]
    first = torch.full_like(lod, -1)
    first[row[:, None], lead[:, None] + torch.arange(k, device=lod.device)] = lead[:, None].expand(-1, k)
    opens = mask & (lod > 0)
    row, column = opens.nonzero().unbind(1)
    opens[row, column] = context.tree.openable(row, lod[row, column], index[row, column])
    return Moves(expand=opens, first=first)


def column_of(context: WorkingContext, row: Tensor, lod: Tensor, index: Tensor) -> Tensor:
    """Columns [E] of nodes (lod, index) [E] in their rows [E], or of the first of their descendants there."""
    start = index * context.tree.block_size**lod
    far = torch.iinfo(torch.long).max
    starts = torch.where(context.mask, context.starts(), far)
    return torch.searchsorted(starts[row], start[:, None].contiguous())[:, 0]
