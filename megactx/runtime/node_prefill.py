"""Keys and values by node: a window is read again under MegaAttention, and only what an edit reaches is computed.

Under plain attention everything behind an edit is dirty. Under MegaAttention a row sees summaries of what is far, which
no edit changes, and leaves of its own segment, so an edit reaches its segment and the live rows. That is not believed
but computed: a row is kept if its embedding, position and spread are as they were, if it sees the nodes that it saw,
and if all of these are kept.

Where a window has only grown by tokens that were read already, and the live region begins where it did, nothing that is
seen has changed: there is nothing to read until an edit comes or a segment settles, every few blocks. Summaries that
have come meanwhile are read then.

Which nodes a summary sees follows from its own name, so there it is enough that no summary before it is dirty.

B rows of a batch, which are read one after the other; N columns of a pass, n new tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megactx.lm import BaseLM, masks
from megactx.lm.adapters import stamp_of
from megactx.memory import WorkingContext
from megactx.memory.pyramid import Attention, Bend, Pyramid

from .cache import KeyCache
from .incremental_prefill import read_each

LEAF, SUMMARY, STRIP = range(3)  # what a node is read as


@dataclass
class _Read:
    """What was read of one row, in the order of the columns of its cache."""

    cache: KeyCache = field(default_factory=KeyCache)
    key: Tensor | None = None  # names of nodes [N]
    same: tuple[Tensor, ...] = ()  # embeddings [N, D], positions [N], spreads [N]: what makes a row what it is
    seen: Tensor | None = None  # signatures of the sets of nodes that rows see [N, 2]; of summaries 0
    shown: int = 0  # column of the first leaf; all behind it are leaves, and nothing else is seen by new tokens
    leaves: Tensor | None = None  # signature of all leaves [2]
    new: list[tuple[Tensor, ...]] = field(default_factory=list)  # key, embeddings, positions, spreads, seen; as above
    last: int = -1  # name of the last leaf
    hidden: Tensor | None = None  # its final state [D]
    end: int = 0  # tokens
    entries: tuple[Tensor, ...] = ()  # LOD, index and embeddings [W, ..] of the window that was read
    bend: Bend | None = None
    live_from: int = 0  # first token of the live region

    def took(self, embeddings: Tensor, positions: Tensor, hidden: Tensor) -> None:
        """New tokens were read behind all leaves: embeddings [n, D], positions [n], the final state of the last [D]."""
        n = len(positions)
        at = torch.arange(self.end, self.end + n, device=positions.device)
        key = _names(torch.zeros_like(at), at, torch.full_like(at, LEAF))
        seen = _hashes(key).T.cumsum(0) + (0 if self.leaves is None else self.leaves)
        self.new.append((key, embeddings, positions, torch.zeros_like(at, dtype=torch.float), seen))
        self.leaves, self.last, self.hidden, self.end = seen[-1], int(key[-1]), hidden, self.end + n

    def cut(self, count: int, hidden: Tensor) -> None:
        """Forget the newest ``count`` new tokens, which came with more; hidden [D] is the newest state that stays."""
        self.new[-1] = key, *_, seen = tuple(part[:-count] for part in self.new[-1])
        self.leaves, self.last, self.hidden, self.end = seen[-1], int(key[-1]), hidden, self.end - count
        columns = self.shown + self.cache.get_seq_length()
        self.cache.keep(columns - count)
        self.cache.show(self.shown)

    def join(self) -> None:
        """New tokens become columns like all others."""
        if self.new:
            before = [] if self.key is None else [(self.key, *self.same, self.seen)]
            self.key, *same, self.seen = (torch.cat(parts) for parts in zip(*before, *self.new, strict=True))
            self.same, self.new = tuple(same), []


class NodePrefill:
    """A base LM under MegaAttention, and what it has read last.

    Args:
        base: frozen.
        attention: of kind ``mega``.

    ``reused`` [B] and ``lengths`` [B] tell of the last reading how many columns were kept, of how many; summaries
    and strips count as columns. ``pairs`` [B] is the share of the pairs of a plain causal pass over the entries that
    rows of entries and strips see. ``hidden`` [B, D] is the final state of the newest entry of each row.

    Raises:
        ValueError: another kind of attention.
    """

    def __init__(self, base: BaseLM, attention: Attention):
        if attention.kind != "mega":
            raise ValueError(f"attention.kind={attention.kind} is not allowed here: mega")
        self.base, self.attention = base, attention
        self.forget()

    def forget(self) -> None:
        """Nothing was read: the next reading computes all."""
        self.rows: list[_Read] = []
        self.stamp = stamp_of(self.base)  # of the adapters that keys and values were computed with
        self.reused = self.lengths = torch.zeros(0, dtype=torch.long)
        self.pairs = torch.zeros(0)
        self.hidden: Tensor | None = None

    def current(self) -> bool:
        """Whether keys and values are those of the adapters that are on now."""
        return stamp_of(self.base) == self.stamp

    def bytes(self) -> int:
        """Of keys, values and what they were computed from."""
        rows = [row for row in self.rows if row.key is not None]
        kept = [part for row in rows for part in (row.key, *row.same, row.seen, *row.entries)]
        return sum(row.cache.bytes() for row in rows) + sum(part.nbytes for part in kept)

    @torch.no_grad()
    def read(self, context: WorkingContext, bends: list[Bend | None] | None = None) -> Tensor:
        """Read the windows; -> final hidden states of the last entry of each row, [B, D].

        Args:
            bends: of each row, where its positions leave those of the text; ``None``: nowhere.
        """
        if not self.current() or len(self.rows) != len(context.counts):
            self.forget()
        self.rows = self.rows or [_Read() for _ in range(len(context.counts))]
        if self._grown(context, bends):
            count = [len(row.key) + sum(len(new[0]) for new in row.new) for row in self.rows]
            self.reused = self.lengths = torch.tensor(count)
            return self.hidden
        try:
            pyramid = self.attention.pyramid(context)
            positions = pyramid.positions(bends)
            found = [self._read(pyramid, positions, row) for row in range(len(self.rows))]
            self._note(context, bends)
            self.hidden = torch.stack([row.hidden for row in self.rows])
        except BaseException:
            self.forget()
            raise
        self.reused, self.lengths, self.pairs = (torch.tensor(part) for part in zip(*found, strict=True))
        return self.hidden

    def _grown(self, context: WorkingContext, bends: list[Bend | None] | None) -> bool:
        """Whether the windows are those that were read, and behind them tokens that were read too."""
        if any(not row.entries or row.hidden is None for row in self.rows):
            return False
        embeddings, ends = context.to_tensor(), context.ends().tolist()
        for number, (row, end) in enumerate(zip(self.rows, ends, strict=True)):
            count, before = int(context.counts[number]), len(row.entries[0])
            bend = bends[number] if bends else None
            if end != row.end or bend != row.bend or self._live_from(end) != row.live_from or count < before:
                return False
            now = tuple(part[number, :count] for part in (context.lod, context.index, embeddings))
            if not all(torch.equal(old, new[:before]) for old, new in zip(row.entries, now, strict=True)):
                return False
            read = [new[1] for new in row.new]
            if now[0][before:].any() or not torch.equal(now[2][before:], torch.cat([now[2][:0], *read])):
                return False
        return True

    def _note(self, context: WorkingContext, bends: list[Bend | None] | None) -> None:
        embeddings, ends = context.to_tensor(), context.ends().tolist()
        for number, (row, end) in enumerate(zip(self.rows, ends, strict=True)):
            count = int(context.counts[number])
            row.entries = tuple(part[number, :count].clone() for part in (context.lod, context.index, embeddings))
            row.bend, row.live_from = bends[number] if bends else None, self._live_from(end)

    def _live_from(self, end: int) -> int:
        return max(0, end - self.attention.live) // self.attention.segment * self.attention.segment

    @torch.no_grad()
    def step(self, ids: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read new tokens behind all that was read: they are live.

        Args:
            ids: [B, n].
            positions: [B, n].
            mask: bool [B, n], those of each row first; ``None``: all of them.

        Returns:
            Final hidden states [B, n, D]; what stands where nothing is there means nothing.
        """
        self.rows = self.rows or [_Read() for _ in range(len(ids))]
        counts = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
        found = None
        try:
            for row, count in enumerate(counts):
                if count:
                    hidden = self._step(self.rows[row], ids[row, :count], positions[row, :count])
                    found = hidden.new_zeros(*ids.shape, hidden.shape[1]) if found is None else found
                    found[row, :count] = hidden
        except BaseException:  # some layers may have the new columns already
            self.forget()
            raise
        self.hidden = torch.stack(
            [found.new_zeros(found.shape[2]) if r.hidden is None else r.hidden for r in self.rows]
        )
        return found

    def cut(self, count: int, hidden: Tensor) -> None:
        """Forget the newest ``count`` tokens of the last step of the one row, which had more; hidden [1, D] is that
        of the newest that stays."""
        try:
            self.rows[0].cut(count, hidden[0])
            self.hidden = hidden
        except BaseException:
            self.forget()
            raise

    @staticmethod
    @torch.no_grad()
    def step_each(readers: Sequence["NodePrefill"], ids: Tensor, positions: Tensor) -> Tensor:
        """Read one new token for each of N readers of one row, in one pass of the base that they share.

        Args:
            ids, positions: [N].

        Returns:
            Final hidden states [N, D]. Rounding aside they are those of N steps.
        """
        embeddings, hidden = read_each(readers, [reader.rows[0].cache for reader in readers], ids, positions)
        for n, reader in enumerate(readers):
            reader.rows[0].took(embeddings[n], positions[n : n + 1], hidden[n, 0])
            reader.hidden = hidden[n]
        return hidden[:, 0]

    def _step(self, old: _Read, ids: Tensor, positions: Tensor) -> Tensor:
        embeddings = self.base.embed(ids)
        hidden = self.base(embeddings[None], positions[None], masks.BEHIND, old.cache)[0]
        old.took(embeddings, positions, hidden[-1])
        return hidden

    def _read(self, pyramid: Pyramid, positions: Tensor, row: int) -> tuple[int, int, float]:
        """-> columns that were kept, all columns, share of pairs."""
        old, mask = self.rows[row], pyramid.mask
        old.join()
        n = int(mask.there[row].sum())
        lod, index, summary, leaf = (p[row, :n] for p in (pyramid.lod, pyramid.index, mask.summary, mask.leaf))
        key = _names(lod, index, torch.where(leaf, LEAF, torch.where(summary, SUMMARY, STRIP)))
        tree = pyramid.context.tree
        spread = tree.encoder.spread(lod)
        same = (
            tree.embeddings(torch.full_like(lod, row), lod, index),
            positions[row, :n],
            torch.zeros(n, device=lod.device) if spread is None else spread,
        )
        own = (~summary).nonzero()[:, 0]
        kind, sees = mask.kinds(row, own)
        sees = sees[:, :n]
        hashes = _hashes(key)
        sets = torch.stack([_up_to(sees * part, kind, own) for part in hashes], dim=1)
        # Itself, where its kind does not say so: sums stand for sets, so nothing may be in one twice.
        alone = ~sees[kind, own]
        seen = same[0].new_zeros(n, 2, dtype=torch.double)
        seen[own] = sets + torch.where(alone[:, None], hashes.T[own], 0)
        place, kept = _kept(old, key, same, seen)
        last = int(leaf.nonzero()[-1])
        kept[last] &= int(key[last]) == old.last  # its state is wanted
        kept = _closed(kept, summary, leaf & (mask.end[row, :n] <= mask.block), kind, sees, own)
        # Leaves come last, so that new tokens see a run of columns and need no mask.
        far = ~leaf
        order = torch.cat(
            [(kept & far).nonzero(), (kept & leaf).nonzero(), (~kept & far).nonzero(), (~kept & leaf).nonzero()]
        )
        order, count = order[:, 0], int(kept.sum())
        clean, dirty = order[:count], order[count:]
        if old.key is not None:
            old.cache.show(0)
            old.cache.select(place[clean][None])
        if len(dirty):
            hidden = self.base(
                same[0][dirty][None],
                same[1][dirty][None],
                _rows_of(mask, row, dirty, n)[:, order][None, None],
                old.cache,
                None if spread is None else same[2][dirty][None],
            )[0]
            if not kept[last]:
                old.hidden = hidden[int((dirty == last).nonzero())]
        old.shown = int(far.sum())
        wrong = leaf[order] != (torch.arange(n, device=lod.device) >= old.shown)
        early, late = (part.nonzero()[:, 0] for part in (wrong & leaf[order], wrong & far[order]))
        old.cache.swap(early, late)
        old.cache.show(old.shown)
        order[early], order[late] = order[late], order[early]
        old.key, old.seen, old.leaves = key[order], seen[order], hashes[:, leaf].sum(1)
        old.same, old.last, old.end = (
            tuple(part[order] for part in same),
            int(key[last]),
            int(pyramid.context.ends()[row]),
        )
        count = int(leaf.sum())
        pairs = int(_up_to(sees.int(), kind, own).sum() + alone.sum())
        return len(clean), n, pairs / (count * (count + 1) / 2)


def _kept(old: _Read, key: Tensor, same: tuple, seen: Tensor) -> tuple[Tensor, Tensor]:
    """-> (column of each node in the old cache, -1 where there is none; which are as they were), [N] each."""
    if old.key is None:
        return torch.full_like(key, -1), torch.zeros_like(key, dtype=torch.bool)
    ranked, order = old.key.sort()
    at = torch.searchsorted(ranked, key).clamp(max=len(ranked) - 1)
    place = torch.where(ranked[at] == key, order[at], -1)
    kept = place >= 0
    for before, now in zip((*old.same, old.seen), (*same, seen), strict=True):
        equal = before[place.clamp(min=0)] == now
        kept &= equal.flatten(1).all(1) if equal.ndim > 1 else equal
    return place, kept


def _closed(kept: Tensor, summary: Tensor, sink: Tensor, kind: Tensor, sees: Tensor, own: Tensor) -> Tensor:
    """What sees a row that is not kept is not kept either, and so on; -> bool [N].

    Args:
        sink: tokens of the first block [N].
        kind, sees, own: of rows that are no summaries, see ``MegaMask.kinds``.
    """
    lost = summary & ~kept
    if (sink & ~kept).any():
        kept = kept & ~summary
    elif lost.any():
        kept = kept & ~(summary & (lost.cumsum(0) > 0))
    while True:
        reached = _up_to((sees & ~kept).int(), kind, own) > 0
        if not (reached & kept[own]).any():
            return kept
        kept = kept.clone()
        kept[own[reached]] = False


def _names(lod: Tensor, index: Tensor, part: Tensor) -> Tensor:
    """One number for each node and what it is read as, of 63 bits at most."""
    return (index * 8 + lod) * 4 + part


def _up_to(values: Tensor, kind: Tensor, at: Tensor) -> Tensor:
    """Values by kind and column [kinds, N] -> the sum of what each row sees [R]: of its kind, as far as itself."""
    return values.cumsum(dim=1)[kind, at]


def _rows_of(mask, row: int, rows: Tensor, n: int) -> Tensor:
    """The full mask of some rows [R, N]."""
    kind, sees = mask.kinds(row, rows)
    at = torch.arange(n, device=rows.device)
    return (sees[kind, :n] & (at <= rows[:, None])) | (at == rows[:, None])


def _hashes(key: Tensor) -> Tensor:
    """Two hashes of 32 bits of each name [N] -> [2, N] in fp64, in which sums of them are exact.

    A row's set of nodes is known by both sums: two sets with equal ones are one set, but for a chance of about 2^-60.
    """
    found = []
    for factor in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F):
        mixed = (key + 1) * (factor - 2**64)
        mixed = (mixed ^ (mixed >> 29)) * -7046029254386353131
        found.append(((mixed >> 17) & 0xFFFFFFFF).double())
    return torch.stack(found)
