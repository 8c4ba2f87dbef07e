"""MegaAttention: who sees whom when a working context is read together with gists of the whole history.

    rows     [sink][ leaf ... ](gist of 32)[ leaf ... ](gist of 32) ... (gist of 1,024) ...  in the order of their ends
    settled  sees the sink, the summaries of what lies before its strip, the strip, older leaves of its own segment
    strip    the last ``overlap`` tokens before a segment of settled leaves, read a second time: its rows see the sink,
             the summaries of what lies before the strip, and older rows of it
    live     sees every leaf before it, and no summary: the newest ``live`` tokens
    summary  sees the sink, the summaries of what lies before its span, and itself

*Leaves* are the entries of the working context, *summaries* the gists of the tree, whatever the window shows of them.
Which summaries a row sees depends on the distance from its segment alone, never on what the window shows: otherwise an
opened gist would change what others see. Counted backwards from a segment's start, level 1 reaches ``mid`` tokens,
level 2 K times as far, level 3 the rest; borders lie on the coarser grid, so each older token is covered once.

A sliding near window would not do: a changed leaf would change its neighbours, those theirs in the next layer, and
after L layers L windows were dirty. Nor would segments that see the leaves of the one before: after L layers L segments
were dirty. So a strip is read a second time, by rows that see no leaf before it. Leaves of a segment are seen by
themselves and live rows, rows of its strip by themselves and the next segment, and neither passes anything on: an edit
changes the leaves of its own segment, those of the next one if it lies in the strip between, and the live rows, at any
depth.

B rows of a batch, N columns, K tokens of a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 3


@dataclass(frozen=True)
class MegaMask:
    """Which columns each row of a pass sees. Columns are in the order of their ends, children before parents.

    Args:
        start: first token of each column [B, N].
        width: its tokens [B, N].
        summary: whether it is a summary, bool [B, N].
        there: whether it is anything, bool [B, N]; padding stands on the right.
        block: K.
        segment: tokens of a segment of settled leaves.
        mid: tokens before a segment that summaries of level 1 cover.
        live: the newest tokens, from the border of a segment on, that see every leaf.
        overlap: tokens of a strip, at most ``segment``; 0: there are none.
        again: which columns are rows of a strip, bool [B, N]; ``None``: none.

    Raises:
        ValueError: a size that is not allowed; the message names it.
    """

    start: Tensor
    width: Tensor
    summary: Tensor
    there: Tensor
    block: int
    segment: int = 256
    mid: int = 1024
    live: int = 256
    overlap: int = 0
    again: Tensor | None = None

    def __post_init__(self):
        check_sizes(self.block, self.segment, self.mid, self.live, self.overlap)

    @property
    def end(self) -> Tensor:
        return self.start + self.width

    @property
    def leaf(self) -> Tensor:
        """Entries of the working context, each once, bool [B, N]."""
        return self.there & ~self.summary if self.again is None else self.there & ~self.summary & ~self.again

    @property
    def live_from(self) -> Tensor:
        """The first token of the live region of each row of the batch, [B]."""
        return live_from(torch.where(self.leaf, self.end, 0).amax(1), self.segment, self.live)

    @property
    def is_live(self) -> Tensor:
        """Leaves of the live region, bool [B, N]."""
        return self.leaf & (self.start >= self.live_from[:, None])

    def borders(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where what a row sees changes its level, each [B, N]: level 3 before the first, level 2 to the second, level
        1 to the third, from where on the row sees its strip and its own segment, or nothing but itself."""
        k = self.block
        own = (self.segments() - torch.where(self.summary, 0, self.overlap)).clamp(min=0)
        second, first = (
            (own - reach).clamp(min=0).div(grid, rounding_mode="floor") * grid
            for reach, grid in ((self.mid, k**2), (self.mid * k, k**3))
        )
        return first, torch.maximum(first, second), own

    def segments(self) -> Tensor:
        """Where the segment of each row begins [B, N]; that of a strip is the one that sees it."""
        border = self.start.div(self.segment, rounding_mode="floor") * self.segment
        if self.again is not None:
            border = torch.where(self.again, border + self.segment, border)
        # A leaf that is coarser than a segment is a segment of its own; so is a summary, whose span lies behind it.
        return torch.where(self.summary | (self.width > self.segment), self.start, border)

    def dense(self) -> Tensor:
        """bool [B, 1, N, N], True = sees. Padding sees itself alone."""
        n, device = self.start.shape[1], self.start.device
        before = torch.ones(n, n, dtype=torch.bool, device=device).tril()
        itself = torch.eye(n, dtype=torch.bool, device=device)
        found = []
        for row in range(len(self.start)):
            kind, sees = self.kinds(row)
            found.append((sees[kind] & before) | itself)
        return torch.stack(found)[:, None]

    def kinds(self, row: int, some: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The mask of a row of the batch in short: rows of a segment see the same, each as far as itself.

        Args:
            some: rows of the pass that are wanted [R]; ``None``: all.

        Returns:
            The kind of each of these [R], and the columns that each kind sees, bool [kinds, N]. A row sees itself too.
        """
        parts = {name: part[row] if some is None else part[row, some] for name, part in self._rows().items()}
        name = parts["segment"].long()  # where its borders lie follows from this and from what it is
        for flag in ("there", "live", "settled", "again"):
            name = 2 * name + parts[flag]
        found, kind = torch.unique(name, return_inverse=True)
        first = torch.zeros_like(found).scatter_(0, kind, torch.arange(len(kind), device=kind.device))
        like = {name: part[first, None] for name, part in parts.items()}
        columns = {name: part[row] for name, part in self._columns().items()}
        return kind, _sees(like, columns, 1, 0)

    def rule(self):
        """-> ``sees(batch, head, row, column)`` on index tensors: the ``mask_mod`` of ``flex_attention``."""
        rows, columns = self._rows(), self._columns()

        def sees(batch, head, row, column):
            row_of = {name: part[batch, row] for name, part in rows.items()}
            column_of = {name: part[batch, column] for name, part in columns.items()}
            return _sees(row_of, column_of, row, column)

        return sees

    def _rows(self) -> dict[str, Tensor]:
        """What of a row decides what it sees, [B, N] each; 32 bits hold any token's place, and compare faster."""
        first, second, own = (border.int() for border in self.borders())
        settled = self.leaf & ~self.is_live
        kinds = {"there": self.there, "live": self.is_live, "settled": settled, "again": self._again()}
        return {"first": first, "second": second, "own": own, "segment": self.segments().int()} | kinds

    def _again(self) -> Tensor:
        return torch.zeros_like(self.there) if self.again is None else self.there & self.again

    def _columns(self) -> dict[str, Tensor]:
        """What of a column decides who sees it, [B, N] each."""
        leaf, sink, level = self.leaf, self.end <= self.block, self._levels()
        covers = self.there & self.summary & ~sink  # the sink is seen in tokens
        found = {"begin": self.start.int(), "stop": self.end.int(), "leaf": leaf, "sink": leaf & sink}
        found["again"] = self._again()
        return found | {f"level{n}": covers & (level == n) for n in range(1, LEVELS + 1)}

    def _levels(self) -> Tensor:
        """LOD of each column [B, N]."""
        return sum((self.width >= self.block**n).long() for n in range(1, LEVELS + 1))

    def pairs(self) -> Tensor:
        """Share of the pairs of a plain causal pass over the leaves that this one computes, [B]; summaries and
        strips included."""
        count, at, seen = self.leaf.sum(1), torch.arange(self.start.shape[1], device=self.start.device), []
        for row, there in enumerate(self.there):
            kind, sees = self.kinds(row)
            alone = ~sees[kind, at]  # it sees itself, and its kind does not say so
            own = sees.cumsum(1, dtype=torch.int32)[kind, at] + alone
            seen.append(own[there].sum())
        return torch.stack(seen) / (count * (count + 1) / 2)


def live_from(tokens, segment: int, live: int):
    """The first token of the live region of a text of so many tokens, a number or an array of any kind."""
    border = (tokens - live) // segment * segment
    return border * (border > 0)


def check_sizes(block: int, segment: int, mid: int, live: int, overlap: int) -> None:
    """Refuse sizes of a ``MegaMask`` that do not fit the grid.

    Raises:
        ValueError: names the size and what is allowed.
    """
    for name, value, least in (("segment", segment, block), ("mid", mid, block), ("live", live, 0)):
        if value < least or name != "live" and value % block:
            allowed = "0 or more" if name == "live" else f"a multiple of block_size={block}"
            raise ValueError(f"attention.{name}={value} is not allowed: {allowed}")
    # A leaf that reached over a border would be seen by half of the segment behind it.
    for level in range(1, LEVELS + 1):
        if segment % block**level and block**level % segment:
            raise ValueError(
                f"attention.segment={segment} is not allowed: gists of {block**level:,} tokens would cross its borders"
            )
    if not 0 <= overlap <= segment or overlap % block:
        raise ValueError(
            f"attention.overlap={overlap} is not allowed: a multiple of block_size={block}, at most"
            f" attention.segment={segment}"
        )


def _sees(row: dict[str, Tensor], column: dict[str, Tensor], q, c) -> Tensor:
    """The rule on what belongs to rows q and columns c, in shapes that broadcast."""
    begin, stop = column["begin"], column["stop"]
    covered = column["level3"] & (stop <= row["first"])
    covered |= column["level2"] & (begin >= row["first"]) & (stop <= row["second"])
    covered |= column["level1"] & (begin >= row["second"]) & (stop <= row["own"])
    covered |= column["sink"]
    near = row["settled"] & column["leaf"] & (begin >= row["segment"])
    near |= (row["settled"] | row["again"]) & column["again"] & (begin >= row["own"]) & (stop <= row["segment"])
    seen = (row["live"] & column["leaf"]) | (~row["live"] & row["there"] & (covered | near))
    return ((c <= q) & seen) | (q == c)


def in_order(start: Tensor, width: Tensor, summary: Tensor, there: Tensor) -> Tensor:
    """Columns [B, N] sorted as a causal pass needs them: by end, leaves before summaries, small ones before large ones.

    Returns:
        Indices [B, N]; padding comes last.
    """
    end = torch.where(there, start + width, torch.iinfo(torch.long).max)
    order = torch.argsort(torch.where(summary, width, 0), dim=1, stable=True)
    return order.gather(1, torch.argsort(end.gather(1, order), dim=1, stable=True))
