"""A window of several trees, judged part by part: each spends its own share of the budget (method 21).

    window    [ part 0 ][ part 1 ][ the session ]        [1, W]: LensNet reads all of it at once
    rows      [ the session ]  room: what no part may spend
              [ part 0      ]  room: its cap                        [G, V], each row with its own price

So a swap is paid for within its part, and no part grows beyond its share. Rows have no history of their own: they are
made for one decision.

W entries of the window, G rows, V entries of the longest, E edits.
"""

import torch
from torch import Tensor

from megactx.memory import WorkingContext

from .edits import Edits, Moves
from .price import price, signed_scores

ALL = 2**62  # address behind the last token of a part: none of its entries is too new to collapse


class PartRows(WorkingContext):
    """The entries of a window as rows: those of the session first, then those of each part.

    Args:
        context: of a ``Composite``; its budget is that of all together.
    """

    def __init__(self, context: WorkingContext):
        self.tree, self.window, self.debug = context.tree, context, False
        parts, count = len(self.tree.parts), int(context.counts[0])
        number = self.tree.part_of(context.starts()[0, :count])
        each = torch.bincount(number, minlength=parts + 1).tolist()
        spans = [(sum(each[:n]), each[n]) for n in (parts, *range(parts))]  # first column and entries of each row
        self.counts = torch.tensor([size for _, size in spans])
        first = torch.tensor([start for start, _ in spans], device=context.lod.device)
        column = torch.arange(int(self.counts.max()), device=first.device)
        self.columns = (first[:, None] + column).clamp(max=max(0, count - 1))  # [G, V], of the window
        there = column < self.counts.to(first.device)[:, None]
        self.lod, self.index = (torch.where(there, self.of(v), 0) for v in (context.lod, context.index))
        room = [context.budget - self.tree.spent, *self.tree.caps]
        self.budget = torch.tensor(room, device=first.device)  # [G]

    @property
    def number(self) -> Tensor:
        """What the allocator calls the rows: all are of one window."""
        return torch.zeros(len(self.counts), 1, dtype=torch.long, device=self.lod.device)

    def of(self, values: Tensor) -> Tensor:
        """Values of the window, [1, W] -> of the rows, [G, V]; what stands in the padding means nothing."""
        return values[0, self.columns]

    def back(self, values: Tensor) -> Tensor:
        """Values of the rows, [G, V] -> of the window, [1, W]; 0 in the padding."""
        out = values.new_zeros(1, self.window.lod.shape[1])
        out[0, self.columns[self.mask]] = values[self.mask]
        return out

    def moves(self, legal: Moves) -> Moves:
        """What may be changed in the window -> in the rows."""
        first = self.of(legal.first) - self.columns[:, :1]
        return Moves(
            expand=self.mask & self.of(legal.expand),
            first=torch.where(self.mask & (self.of(legal.first) >= 0), first, -1),
        )

    def stops(self) -> Tensor:
        """Address behind the last token of the session, [G]; parts have no newest tokens."""
        out = torch.full((len(self.counts),), ALL, device=self.lod.device)
        out[0] = self.window.stops()[0]
        return out


@torch.no_grad()
def priced(
    context: WorkingContext, legal: Moves, v_down: Tensor, v_keep: Tensor, tau: Tensor, margin: float | Tensor
) -> tuple[Tensor, Tensor]:
    """LensNet's values of a window, [1, W] each -> a price for the session and each part, [G]; signed scores [1, W]."""
    rows = PartRows(context)
    own, (down, keep) = rows.moves(legal), (torch.where(rows.mask, rows.of(v), 0) for v in (v_down, v_keep))
    now = price(down, keep, own, rows.budget - rows.lengths, context.tree.block_size, margin)
    return now, rows.back(signed_scores(down, keep, own, now, tau))


def of_window(edits: Edits) -> Edits:
    """Edits of rows -> of the one window, in their order."""
    return Edits(torch.zeros_like(edits.row), edits.lod, edits.index, edits.expand)
