"""The cold start of a working context: fine where it is new, coarse where it is old.

    level  0    1  ...   2  ...  3   ...     2      ...     1    ...   0
          [sink)[K, K^2)[K^2, ..)[..., b3)[b3, ...., b2)[b2, ..., b1)[b1, T)

From the present backwards, level n reaches to the border b(n + 1). Borders lie on the grid of the coarser level,
rounded outwards. From the start forwards, level n begins at K^n: block 0 stays raw, so no node 0 of any level is used.
"""

from bisect import bisect_left

import torch
from torch import Tensor

from .composite import Composite

RAW, FINE = 256, 2_048  # tokens at LOD0, tokens before them at LOD1 (method 8)


def entries(tree, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> lod [B, W], index [B, W], lengths [B] of a working context of the whole tree, within ``budget``.

    Raises:
        ValueError: not even the coarsest levels fit.
    """
    if isinstance(tree, Composite):
        return tree.entries(budget)
    k, rows = tree.block_size, []
    for length in tree.lengths.tolist():
        runs = _Plan(length, k, tree.depth, budget).runs()
        row = [(torch.full((end - first,), n), torch.arange(first, end)) for n, first, end in runs if end > first]
        row = [torch.cat(part) for part in zip(*row, strict=True)] if row else [torch.zeros(0).long()] * 2
        rows.append(above_floors(tree, len(rows), *row) if tree.compacted else row)
    lengths = torch.tensor([len(lod) for lod, _ in rows])
    out = torch.zeros(2, len(rows), int(lengths.max()), dtype=torch.long)
    for b, (lod, index) in enumerate(rows):
        out[0, b, : len(lod)], out[1, b, : len(lod)] = lod, index
    return out[0].to(tree.device), out[1].to(tree.device), lengths


def above_floors(tree, row: int, lod: Tensor, index: Tensor) -> list[Tensor]:
    """The same with what is still there in the place of what was taken away. A floor's span begins and ends with
    entries of the plan, for its borders lie on the grid of the coarser level."""
    floor = tree.floors(torch.full_like(lod, row), lod, index).to(lod.device)
    up = floor > lod
    start = index * tree.block_size**lod
    nodes = torch.stack([torch.where(up, floor, lod), torch.where(up, start // tree.block_size**floor, index)])
    return [*torch.unique_consecutive(nodes, dim=1)]


class _Plan:
    """Borders of one row: b[0] = T >= b[1] >= ... >= b[top] >= b[top + 1] = 0, and b[n] is a multiple of K^n."""

    def __init__(self, length: int, k: int, depth: int, budget: int):
        self.length, self.k, self.budget = length, k, budget
        # The coarsest level that can be used has a node besides node 0.
        self.top = max((n for n in range(1, depth + 1) if length >= 2 * k**n), default=0)
        self.coarse = [0] * (self.top + 2)  # the farthest that borders 3 and up may lie from the start
        self._place(length - RAW, FINE)
        self._coarsen()
        if self.cost() > budget:
            self._narrow()
        else:
            self._widen()

    def runs(self) -> list[tuple[int, int, int]]:
        """(level, first node, end) in the order of the text."""
        k, b, rising, falling = self.k, self.b, [], []
        for n in range(self.top + 1):
            first = k**n if n else 0
            rising.append((n, first, min(k ** (n + 1), b[n + 1])))
            falling.append((n, max(first, b[n + 1]), b[n]))
        return [(n, first // k**n, end // k**n) for n, first, end in rising + falling[::-1] if end > first]

    def cost(self) -> int:
        return sum(end - first for _, first, end in self.runs())

    def _place(self, border: int, fine: int) -> None:
        """Raw from ``border`` on, LOD1 for ``fine`` tokens before it, then as coarse as ``coarse`` allows."""
        self.border, self.fine, self.b = border, fine, [self.length]
        for n in range(1, self.top + 1):
            wanted = border if n == 1 else self.b[1] - fine if n == 2 else self.coarse[n]
            self.b.append(max(0, min(wanted, self.b[-1])) // self.k**n * self.k**n)
        self.b.append(0)

    def _least(self, place, most: int) -> None:
        """Call ``place`` with the smallest of 0 .. most with which the budget holds, or with ``most``."""

        def fits(steps: int) -> bool:
            place(steps)
            return self.cost() <= self.budget

        place(bisect_left(range(most), True, key=fits))

    def _coarsen(self) -> None:
        """Use coarser levels for the oldest text, no more than the budget needs."""

        def reach(steps: int) -> None:
            self.coarse[n] = steps * self.k**n
            self._place(self.border, self.fine)

        for n in range(3, self.top + 1):
            self._least(reach, self.b[n - 1] // self.k**n)

    def _narrow(self) -> None:
        """Use less LOD1, then less LOD0."""
        k, border = self.k, self.border
        self.coarse = [self.length] * len(self.coarse)
        self._least(lambda steps: self._place(border, FINE - steps * k), -(-FINE // k))
        self._least(lambda steps: self._place(border + steps * k, self.fine), -(-RAW // k))
        if self.cost() > self.budget:
            raise ValueError(
                f"budget={self.budget} is too small: {self.length} tokens take at least {self.cost()} entries at level"
                f" {self.top}, the coarsest that this tree has for them"
            )

    def _widen(self) -> None:
        """Spend the rest of the budget on more LOD0, then on more LOD1."""
        k, border, fine = self.k, max(0, self.border), self.fine
        self._least(lambda steps: self._place(steps * k, fine), border // k)
        border = self.border
        self._least(lambda steps: self._place(border, border - steps * k), max(0, border - fine) // k)
