"""Keys and values by node: a window is read again under MegaAttention, and only what an edit reaches is computed.

Under plain attention everything behind an edit is dirty. Under MegaAttention a row sees summaries of what is far, which
no edit changes, and leaves of its own segment, so an edit reaches its segment and the live rows. That is not believed
but computed: a row is kept if its embedding, position and spread are as they were, if it sees the nodes that it saw,
and if all of these are kept.

N columns of a pass, D width. Rows of a batch are read one after the other.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megactx.lm import BaseLM
from megactx.lm.adapters import stamp_of
from megactx.memory import WorkingContext
from megactx.memory.pyramid import Attention, Pyramid

from .cache import KeyCache

LEAF, SUMMARY, STRIP = range(3)  # what a node is read as


@dataclass
class _Read:
    """What was read of one row, in the order of the columns of its cache."""

    cache: KeyCache = field(default_factory=KeyCache)
    key: Tensor | None = None  # names of nodes [N]
    same: tuple[Tensor, ...] = ()  # embeddings [N, D], positions [N], spreads [N]: what makes a row what it is
    seen: Tensor | None = None  # signatures of the sets of nodes that rows see [N, 2]
    leaf: Tensor | None = None  # bool [N], what new tokens see
    hidden: Tensor | None = None  # final hidden states [N, D]
    last: int = 0  # column of the last leaf
    end: int = 0  # tokens


class NodePrefill:
    """A base LM under MegaAttention, and what it has read last.

    Args:
        base: frozen.
        attention: of kind ``mega``.

    ``reused`` [B] and ``lengths`` [B] tell of the last reading how many columns were kept, of how many; summaries
    count as columns.

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

    @torch.no_grad()
    def read(self, context: WorkingContext) -> Tensor:
        """Read the windows; -> final hidden states of the last entry of each row, [B, D]."""
        if stamp_of(self.base) != self.stamp or len(self.rows) not in (0, len(context.counts)):
            self.forget()
        self.rows = self.rows or [_Read() for _ in range(len(context.counts))]
        try:
            pyramid = self.attention.pyramid(context)
            found = [self._read(pyramid, row) for row in range(len(self.rows))]
        except BaseException:
            self.forget()
            raise
        self.reused, self.lengths = (torch.tensor(part) for part in zip(*found, strict=True))
        return torch.stack([old.hidden[old.last] for old in self.rows])

    @torch.no_grad()
    def step(self, ids: Tensor, row: int = 0) -> Tensor:
        """Read new tokens ids [n] behind what a row has read: they are live. -> final hidden states [n, D]."""
        old, n = self.rows[row], len(ids)
        at = old.end + torch.arange(n, device=ids.device)
        new = (self.base.embed(ids), at, torch.zeros_like(at, dtype=torch.float))
        sees = torch.cat([old.leaf.expand(n, -1), torch.ones(n, n, dtype=torch.bool, device=ids.device).tril()], dim=1)
        try:
            hidden = self.base(new[0][None], at[None], sees[None, None], old.cache)[0]
        except BaseException:  # some layers may have the new columns already
            self.forget()
            raise
        tokens = torch.zeros_like(at)
        key = torch.cat([old.key, _names(tokens, at, tokens + LEAF)])
        old.seen = torch.cat([old.seen, sees.double() @ _hashes(key).T])
        old.key, old.leaf = key, torch.cat([old.leaf, torch.ones_like(at, dtype=torch.bool)])
        old.same = tuple(torch.cat(pair) for pair in zip(old.same, new, strict=True))
        old.hidden = torch.cat([old.hidden, hidden])
        old.last, old.end = len(key) - 1, old.end + n
        return hidden

    def _read(self, pyramid: Pyramid, row: int) -> tuple[int, int]:
        """-> (columns that were kept, all columns)."""
        old, mask = self.rows[row], pyramid.mask
        n = int(mask.there[row].sum())
        lod, index, summary = pyramid.lod[row, :n], pyramid.index[row, :n], mask.summary[row, :n]
        leaf = mask.leaf[row, :n]
        part = torch.where(leaf, LEAF, torch.where(summary, SUMMARY, STRIP))
        key, (kind, sees) = _names(lod, index, part), mask.kinds(row)
        kind, sees = kind[:n], sees[:, :n]
        tree = pyramid.context.tree
        spread = tree.encoder.spread(lod)
        same = (
            tree.embeddings(torch.full_like(lod, row), lod, index),
            pyramid.positions()[row, :n],
            torch.zeros(n, device=lod.device) if spread is None else spread,
        )
        at = torch.arange(n, device=lod.device)
        hashes = _hashes(key)
        seen = torch.stack([_up_to(sees * part, kind, at) for part in hashes], dim=1)
        # Itself, where its kind does not say so: sums stand for sets, so nothing may be in one twice.
        alone = ~sees[kind, at]
        seen += torch.where(alone[:, None], hashes.T, 0)
        place, kept = self._kept(old, key, same, seen, sees, kind)
        clean, dirty = kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]
        order = torch.cat([clean, dirty])
        if old.key is not None:
            old.cache.select(place[clean][None])
        hidden = same[0].new_zeros(n, same[0].shape[1]) if old.hidden is None else old.hidden[place.clamp(min=0)]
        if len(dirty):
            hidden[dirty] = self.base(
                same[0][dirty][None],
                same[1][dirty][None],
                _rows_of(sees, kind, dirty)[:, order][None, None],
                old.cache,
                None if spread is None else same[2][dirty][None],
            )[0].to(hidden.dtype)
        old.key, old.seen, old.leaf = key[order], seen[order], leaf[order]
        old.same, old.hidden = tuple(part[order] for part in same), hidden[order]
        last = int(leaf.nonzero()[-1])
        old.last, old.end = int((order == last).nonzero()), int(pyramid.context.ends()[row])
        return len(clean), n

    @staticmethod
    def _kept(old: _Read, key: Tensor, same: tuple, seen: Tensor, sees: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
        """-> (column of each node in the old cache, -1 where there is none; which rows are as they were), [N] each."""
        if old.key is None:
            return torch.full_like(key, -1), torch.zeros_like(key, dtype=torch.bool)
        ranked, order = old.key.sort()
        at = torch.searchsorted(ranked, key).clamp(max=len(ranked) - 1)
        place = torch.where(ranked[at] == key, order[at], -1)
        kept = place >= 0
        for before, now in zip((*old.same, old.seen), (*same, seen), strict=True):
            equal = before[place.clamp(min=0)] == now
            kept &= equal.flatten(1).all(1) if equal.ndim > 1 else equal
        # What sees a row that is not kept is not kept either, and so on.
        at = torch.arange(len(key), device=key.device)
        while True:
            reached = _up_to((sees & ~kept).double(), kind, at) > 0
            if not (reached & kept).any():
                return place, kept
            kept = kept & ~reached


def _names(lod: Tensor, index: Tensor, part: Tensor) -> Tensor:
    """One number for each node and what it is read as, of 63 bits at most."""
    return (index * 8 + lod) * 4 + part


def _up_to(values: Tensor, kind: Tensor, at: Tensor) -> Tensor:
    """Values by kind and column [kinds, N] -> the sum of what each row sees [N]: of its kind, as far as itself."""
    return values.cumsum(dim=1)[kind, at]


def _rows_of(sees: Tensor, kind: Tensor, rows: Tensor) -> Tensor:
    """The full mask of some rows [n, N]."""
    at = torch.arange(sees.shape[1], device=sees.device)
    return (sees[kind[rows]] & (at <= rows[:, None])) | (at == rows[:, None])


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
