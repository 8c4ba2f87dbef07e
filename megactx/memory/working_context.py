"""WorkingContext: the fixed-budget mix of tokens and gists that the base LM really sees (method 8).

    [ sink: 32 tokens ][ gists of 1,024 ... ][ gists of 32 ... ][ last tokens ]

Entries are nodes (lod, index) of a tree. Together they stand for tokens 0 .. end - 1, each exactly once. The start,
width and position of an entry are derived. An edit is worked out as a whole before anything is changed, so a refused
edit leaves everything as it was.

B rows, W entries, K children of a node, D width, E edits.
"""

import torch
from torch import Tensor

from .tree import MegaContextTree

RAGGED = 2**62  # start of an entry of the padding: behind all others


class WorkingContext:
    """Entries of a tree, at most ``budget`` per row.

    Args:
        tree: what the entries are nodes of.
        lod: [B, W], padded on the right.
        index: [B, W].
        lengths: entries of each row, [B].
        budget: the most entries of a row.
        debug: check the invariants after every edit.

    Raises:
        ValueError: an invariant does not hold; the message names it.
    """

    def __init__(self, tree: MegaContextTree, lod, index, lengths, budget: int, debug: bool = False):
        self.tree, self.budget, self.debug = tree, budget, debug
        self._set(lod.to(tree.device).long(), index.to(tree.device).long(), torch.as_tensor(lengths).cpu().long())
        self.check()

    @classmethod
    def recency(cls, tree: MegaContextTree, budget: int, debug: bool = False) -> "WorkingContext":
        """The sink and the newest text raw, older text coarser and coarser: the cold start.

        The first block stays because attention leans on it (Xiao et al. 2023, arXiv 2309.17453). See ``cold_start``.
        Setting: ``--megacontext recency``.

        Raises:
            ValueError: not even the coarsest levels of the tree fit the budget.
        """
        from .cold_start import entries

        return cls(tree, *entries(tree, budget), budget, debug)

    def copy(self) -> "WorkingContext":
        """Another working context with the same entries, of the same tree."""
        return WorkingContext(self.tree, self.lod, self.index, self.counts, self.budget, self.debug)

    def check(self) -> None:
        """Raise ValueError if one of the eight invariants of method 8 does not hold."""
        from .invariants import violations

        if wrong := violations(self):
            raise ValueError(f"working context: {'; '.join(wrong)}")

    @property
    def lengths(self) -> Tensor:
        """Entries of each row, [B]: its cost."""
        return self.counts.to(self.lod.device)

    @property
    def number(self) -> Tensor:
        """By which number each row is remembered, [B, 1]."""
        return torch.arange(len(self.lod), device=self.lod.device)[:, None]

    @property
    def mask(self) -> Tensor:
        """Which columns hold an entry and no padding, bool [B, W]."""
        return torch.arange(self.lod.shape[1], device=self.lod.device) < self.lengths[:, None]

    def lods(self) -> Tensor:
        """LOD of each entry, [B, W]; 0 in the padding."""
        return self.lod

    def widths(self) -> Tensor:
        """Tokens that each entry stands for, [B, W]; 1 in the padding."""
        return self._powers()[self.lod]

    def starts(self) -> Tensor:
        """First token of each entry, its address in the tree, [B, W]; 0 in the padding."""
        return self.index * self.widths()

    def ends(self) -> Tensor:
        """Tokens that each row stands for, [B]."""
        return torch.where(self.mask, self.widths(), 0).sum(1)

    def stops(self) -> Tensor:
        """Address behind the last token of each row, [B]."""
        return self.tree.address(self.ends())

    def borders(self) -> Tensor | None:
        """Which entries begin another part of a ``Composite`` than the one before, bool [B, W]; ``None``: there is one
        tree."""
        number = self.tree.part_of(self.starts())
        return None if number is None else torch.nn.functional.pad(number.diff() != 0, (1, 0), value=True)

    def positions(self, limit: int | None = None) -> Tensor:
        """The position at which the base LM reads each entry: a token's own, a gist's where its GistNet places it.

        Args:
            limit: positions that the base was trained on. Rows that end beyond it are *rebased*. The sink keeps
                0 .. K - 1. The newest raw run keeps its spacing, and its last token is at ``limit`` - 1. Entries
                between the two are squeezed, in order. A caller that goes on decoding gives ``limit`` less the tokens
                to come. ``None``: absolute positions, without a limit.

        Returns:
            [B, W], strictly ascending, 0 in the padding.

        Raises:
            ValueError: a row has more entries than ``limit``.
        """
        offsets = [self.tree.encoder.offset_in(self.tree.block_size**n) for n in range(1, self.tree.depth + 1)]
        absolute = self.tree.rank(self.starts()) + torch.tensor([0, *offsets], device=self.lod.device)[self.lod]
        absolute = torch.where(self.mask, absolute, 0)
        if limit is None:
            return absolute
        return torch.where((self.ends() > limit)[:, None], self._rebased(absolute, limit), absolute)

    def to_tensor(self) -> Tensor:
        """The vectors that the base LM reads, [B, W, D] in the dtype of its embeddings; 0 in the padding."""
        row, column = self.mask.nonzero().unbind(1)
        embeddings = self.tree.embeddings(row, self.lod[row, column], self.index[row, column])
        b, w = self.lod.shape
        if len(row) < b * w:
            padded = embeddings.new_zeros(b * w, self.tree.width)
            embeddings = padded.index_copy_(0, row * w + column, embeddings)
        return embeddings.view(b, w, self.tree.width)

    def append(self, count: int | Tensor | None = None) -> None:
        """Take up the next tokens of the tree, raw.

        Args:
            count: how many, one number for all rows or [B]; ``None``: all that the tree has.

        Raises:
            ValueError: the tree has fewer tokens left, or they do not fit the budget.
        """
        ends = self.ends().cpu()
        ahead = self.tree.lengths - ends
        count = ahead if count is None else torch.as_tensor(count).cpu().long().expand(len(ends))
        if ((count < 0) | (count > ahead)).any():
            raise ValueError(f"append: count={count.tolist()}, the tree has {ahead.tolist()} more tokens")
        counts = self.counts + count
        self._check_budget(counts)
        first, end = self.lengths[:, None], counts.to(self.lod.device)[:, None]
        column = torch.arange(int(counts.max()), device=self.lod.device).expand(len(counts), -1)
        grow = (0, column.shape[1] - self.lod.shape[1])
        new = (column >= first) & (column < end)
        behind = self.tree.address(ends.to(column.device)[:, None] + column - first)
        index = torch.where(new, behind, _pad(self.index, grow))
        self._set(_pad(self.lod, grow), index, counts)

    def expand(self, entry: int | Tensor, row: int | Tensor = 0) -> None:
        """Put the K children of gists in their place, all at once.

        Args:
            entry: columns of the gists in their rows, one or [E].
            row: their rows, one or [E].

        Raises:
            ValueError: there is no such entry, it is a token or named twice, or the children do not fit the budget.
        """
        row, entry = self._pairs(row, entry)
        self._check_entries(row, entry)
        if (wrong := self.lod[row, entry] == 0).any():
            raise ValueError(f"expand: entry {int(entry[wrong][0])} of row {int(row[wrong][0])} is a token")
        if (wrong := ~self.tree.openable(row, self.lod[row, entry], self.index[row, entry])).any():
            raise ValueError(
                f"expand: what lies below entry {int(entry[wrong][0])} of row {int(row[wrong][0])} was taken away"
            )
        repeat, lod, index = self.mask.long(), self.lod.clone(), self.index.clone()
        repeat[row, entry] = self.tree.block_size
        if repeat.sum() != self.counts.sum() + len(row) * (self.tree.block_size - 1):
            raise ValueError("expand: an entry is named twice")
        self.tree.note_opened(row, lod[row, entry], index[row, entry])
        lod[row, entry] -= 1
        index[row, entry] *= self.tree.block_size
        self._splice(repeat, lod, index)

    def collapse(self, lod: int | Tensor, index: int | Tensor, row: int | Tensor = 0) -> None:
        """Put gists in the place of their K children, all at once.

        Args:
            lod: level of the gists, one or [E].
            index: their indices in that level, one or [E].
            row: their rows, one or [E].

        Raises:
            ValueError: there is no such gist, it holds block 0 or is protected, or its K children are not all there.
        """
        row, lod, index = self._pairs(row, lod, index)
        self._check_usable(row, lod, index)
        if (lod < 1).any():
            raise ValueError("collapse: lod=0 is not allowed: a token has no children")
        k = self.tree.block_size
        start = (index * self._powers()[lod]).contiguous()
        starts = torch.where(self.mask, self.starts(), RAGGED)
        first = torch.searchsorted(starts[row], start[:, None])  # [E, 1]
        place = first + torch.arange(k, device=first.device)  # [E, K]
        last = place.clamp(max=starts.shape[1] - 1)
        same = (place == last) & self.mask[row[:, None], last] & (self.lod[row[:, None], last] == lod[:, None] - 1)
        same &= starts[row[:, None], last] == start[:, None] + (place - first) * self._powers()[lod - 1][:, None]
        if not (whole := same.all(1)).all():
            wrong = (~whole).nonzero()[0, 0]
            raise ValueError(
                f"collapse: the {k} children of (lod {int(lod[wrong])}, index {int(index[wrong])}) are not all in row"
                f" {int(row[wrong])}"
            )
        repeat, lods, indices = self.mask.long(), self.lod.clone(), self.index.clone()
        repeat[row[:, None], place[:, 1:]] = 0
        lods[row, place[:, 0]], indices[row, place[:, 0]] = lod, index
        self._splice(repeat, lods, indices)

    def replace(self, start: int, count: int, replacements: Tensor, lod: int, row: int = 0) -> None:
        """Put other nodes in the place of entries start .. start + count - 1 of a row, for exactly the same tokens.

        Args:
            replacements: indices of the nodes, [E], in the order of the text.
            lod: their level.

        Raises:
            ValueError: there are no such entries or nodes; the nodes stand for other tokens, hold block 0 or are
                protected; or they do not fit the budget.
        """
        rows, entries = self._pairs(row, torch.arange(start, start + max(count, 0)))
        self._check_entries(rows, entries)
        nodes = replacements.to(self.lod.device).long().flatten()
        if count < 1 or len(nodes) == 0:
            raise ValueError(f"replace: count={count} entries by {len(nodes)} nodes, at least 1 of both is needed")
        level = torch.full_like(nodes, lod)
        self._check_usable(torch.full_like(nodes, row), level, nodes)
        width = int(self._powers()[lod])
        began, old = int(self.starts()[row, start]), int(self.widths()[row, entries].sum())
        straight = torch.arange(len(nodes), device=nodes.device) + nodes[0]
        if int(nodes[0]) * width != began or len(nodes) * width != old or not torch.equal(nodes, straight):
            raise ValueError(
                f"replace: the nodes do not stand for the same tokens as the entries, which are {began} to"
                f" {began + old - 1}"
            )
        repeat, lods, indices = self.mask.long(), self.lod.clone(), self.index.clone()
        repeat[rows, entries] = 0
        repeat[row, start], lods[row, start], indices[row, start] = len(nodes), lod, nodes[0]
        self._splice(repeat, lods, indices)

    def _splice(self, repeat: Tensor, lod: Tensor, index: Tensor) -> None:
        """Each entry becomes ``repeat`` [B, W] nodes of level lod [B, W] from index [B, W] on."""
        counts = repeat.sum(1).cpu()
        self._check_budget(counts)
        flat = repeat.flatten()
        entry = torch.repeat_interleave(flat, output_size=int(counts.sum()))
        order = torch.arange(len(entry), device=flat.device)  # of all new entries, row after row
        offset = order - (flat.cumsum(0) - flat)[entry]  # within what an entry became
        row = entry // lod.shape[1]
        before = (counts.cumsum(0) - counts).to(flat.device)
        new = lod.new_zeros(2, len(counts), int(counts.max()))
        new[0, row, order - before[row]] = lod.flatten()[entry]
        new[1, row, order - before[row]] = index.flatten()[entry] + offset
        self._set(new[0], new[1], counts)

    def _set(self, lod: Tensor, index: Tensor, counts: Tensor) -> None:
        self.lod, self.index, self.counts = lod, index, counts
        if self.debug:
            self.check()

    def _rebased(self, absolute: Tensor, limit: int) -> Tensor:
        """absolute [B, W] -> positions below ``limit``, see ``positions``."""
        k, w = self.tree.front, absolute.shape[1]
        if ((self.ends() > limit) & (self.lengths > limit)).any():
            raise ValueError(f"positions: {int(self.counts.max())} entries do not fit limit={limit} positions")
        column = torch.arange(w, device=absolute.device)
        last_gist = torch.where(self.mask & (self.lod > 0), column, -1).amax(1, keepdim=True)  # [B, 1]
        run = self.lengths[:, None] - 1 - last_gist  # tokens of the newest raw run
        room, before = limit - run, absolute.gather(1, last_gist.clamp(min=0))  # the squeezed end below ``room``
        squeezed = k + (absolute - k) * (room - k).clamp(min=0) // (before + 1 - k).clamp(min=1)
        # Strictly ascending: each at least one behind its neighbour, and with room for all entries behind it.
        squeezed = torch.where(column < k, column, squeezed)
        squeezed = (squeezed - column).cummax(1).values + column
        squeezed = torch.minimum(squeezed, room - 1 - last_gist + column)
        moved = torch.where(column > last_gist, limit - self.lengths[:, None] + column, squeezed)
        return torch.where(self.mask, moved, 0)

    def _powers(self) -> Tensor:
        """K^lod of every level of the tree, [levels]."""
        k = self.tree.block_size
        return torch.tensor([k**n for n in range(self.tree.depth + 1)], device=self.lod.device)

    def _pairs(self, *numbers: int | Tensor) -> list[Tensor]:
        """Numbers and tensors [E] -> tensors [E], and rows that there are."""
        together = torch.broadcast_tensors(*[torch.as_tensor(n, device=self.lod.device).long() for n in numbers])
        row, *others = (t.reshape(-1) for t in together)
        if ((row < 0) | (row >= len(self.counts))).any():
            raise ValueError(f"row={row.tolist()} is not allowed: 0 to {len(self.counts) - 1}")
        return [row, *others]

    def _check_entries(self, row: Tensor, entry: Tensor) -> None:
        if (wrong := (entry < 0) | (entry >= self.lengths[row])).any():
            r = int(row[wrong][0])
            raise ValueError(f"entry {int(entry[wrong][0])} is not in row {r}, which has {int(self.counts[r])}")

    def _check_usable(self, row: Tensor, lod: Tensor, index: Tensor) -> None:
        if (wrong := ~self.tree.usable(row, lod, index)).any():
            raise ValueError(
                f"node (lod {int(lod[wrong][0])}, index {int(index[wrong][0])}) may not stand in row"
                f" {int(row[wrong][0])}: it is not in the tree, holds block 0 or is protected"
            )

    def _check_budget(self, counts: Tensor) -> None:
        if (counts > self.budget).any():
            raise ValueError(f"the edit needs {int(counts.max())} entries, the budget is {self.budget}")


def _pad(tensor: Tensor, grow: tuple[int, int]) -> Tensor:
    return torch.nn.functional.pad(tensor, grow)
