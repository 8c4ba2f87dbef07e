"""Reads a window again and again, and computes only what has changed: the dirty suffix (method 13).

An entry's keys and values depend on what stands before it and on nothing else. So up to the first entry whose
embedding, position or spread is another one than at the last reading, all of them are kept; from there on they are
computed. New tokens are read behind the window one by one, and are part of it at the next reading.

B rows, W entries of a window, S columns that were read, N new tokens, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megactx.lm import BaseLM, masks
from megactx.lm.adapters import stamp_of

from .cache import KeyCache
from .decode_graph import DecodeGraph


def read_each(readers: Sequence, caches: Sequence[KeyCache], ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """One new token of each of N readers [N] through their base LM -> its embeddings and states [N, 1, D]."""
    base = readers[0].base
    embeddings = base.embed(ids[:, None])
    try:
        return embeddings, base.forward_each(embeddings, positions[:, None], caches)
    except BaseException:  # some layers of some readers may have the new column already
        for reader in readers:
            reader.forget()
        raise


class IncrementalPrefill:
    """A base LM, and what it has read last.

    Args:
        base: frozen.
        graphs: single new tokens are read at fixed shapes, on a card as one CUDA graph, see ``decode_graph``.

    ``reused`` [B] and ``lengths`` [B] tell of the last reading how many entries were kept, of how many.
    """

    def __init__(self, base: BaseLM, graphs: bool = False):
        self.base, self.graphs = base, graphs
        self.forget()

    def forget(self) -> None:
        """Nothing was read: the next reading computes all."""
        self.cache = KeyCache()
        self.graph: DecodeGraph | None = None  # over that cache, with these adapters
        self.stamp = stamp_of(self.base)  # of the adapters that keys and values were computed with
        self.columns: list[tuple[Tensor, ...]] = []  # (embeddings, positions, sigma, there), [B, n, ..] each
        self.whole = True  # all columns are there in all rows
        self.hidden: Tensor | None = None  # [B, D], of the last entry of each row
        self.reused = self.lengths = torch.zeros(0, dtype=torch.long)

    def current(self) -> bool:
        """Whether keys and values are those of the adapters that are on now."""
        return stamp_of(self.base) == self.stamp

    @torch.no_grad()
    def read(self, embeddings: Tensor, positions: Tensor, lengths: Tensor, sigma: Tensor | None = None) -> Tensor:
        """Read windows, padded on the right; the arguments are those of ``BaseLM.read``.

        Args:
            lengths: [B], at least 1 each.

        Returns:
            Final hidden states of the last entry of each row, [B, D].
        """
        if not self.current():
            self.forget()
        new = self.given(embeddings, positions, lengths, sigma)
        common = self._common(new)
        complete = (common == lengths) & (common == self._counts()) if self.columns else common < 0
        start = common.minimum(lengths - 1)[~complete]
        start = int(start.min()) if len(start) else None
        try:
            if start is not None:
                hidden = self._compute(new, start, sigma is not None)
                place = (lengths - 1 - start).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[2])
                last = hidden.gather(1, place)[:, 0]
                # Of a row that has not changed and ends before ``start`` nothing was computed.
                self.hidden = (
                    last if self.hidden is None else torch.where((lengths > start)[:, None], last, self.hidden)
                )
        except BaseException:
            self.forget()
            raise
        self.lengths = lengths.cpu()
        self.reused = self.lengths if start is None else self.lengths.clamp(max=start)
        return self.hidden

    @staticmethod
    def given(embeddings: Tensor, positions: Tensor, lengths: Tensor, sigma: Tensor | None) -> tuple[Tensor, ...]:
        """What makes the entries of a window what they are, as in ``columns``; 0 where nothing is there."""
        mask = torch.arange(embeddings.shape[1], device=embeddings.device) < lengths[:, None]
        embeddings = torch.where(mask[..., None], embeddings, 0.0)
        positions = torch.where(mask, positions, 0)
        spread = torch.zeros_like(positions, dtype=torch.float) if sigma is None else torch.where(mask, sigma, 0.0)
        return embeddings, positions, spread, mask

    @torch.no_grad()
    def step(self, ids: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read new tokens behind all that was read.

        Args:
            ids: [B, N].
            positions: [B, N].
            mask: bool [B, N], those of each row first; ``None``: all of them. The others are read by nobody.

        Returns:
            Final hidden states [B, N, D]; what stands where nothing is there means nothing.
        """
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        new = (self.base.embed(ids), positions * mask, torch.zeros_like(positions, dtype=torch.float), mask)
        try:
            hidden = self._pass(new, 0, None)
            last = hidden.gather(1, (mask.sum(1) - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]
            self.hidden = last if self.hidden is None else torch.where(mask.any(1)[:, None], last, self.hidden)
        except BaseException:
            self.forget()
            raise
        return hidden

    def cut(self, count: int, hidden: Tensor) -> None:
        """Forget the newest ``count`` tokens of the last step, which had more; hidden [B, D] is the state of the newest
        that stays."""
        try:
            self.columns[-1] = tuple(part[:, :-count] for part in self.columns[-1])
            self.cache.keep(self.cache.get_seq_length() - count)
            self.hidden = hidden
        except BaseException:
            self.forget()
            raise

    @staticmethod
    @torch.no_grad()
    def step_each(readers: Sequence["IncrementalPrefill"], ids: Tensor, positions: Tensor) -> Tensor:
        """Read one new token for each of N readers of one row, in one pass of the base that they share.

        Args:
            ids, positions: [N].

        Returns:
            Final hidden states [N, D]. Rounding aside they are those of N steps.
        """
        embeddings, hidden = read_each(readers, [reader.cache for reader in readers], ids, positions)
        positions = positions[:, None]
        spread, mask = torch.zeros_like(positions, dtype=torch.float), torch.ones_like(positions, dtype=torch.bool)
        for n, reader in enumerate(readers):
            reader.columns.append(tuple(part[n : n + 1] for part in (embeddings, positions, spread, mask)))
            reader.hidden = hidden[n]
        return hidden[:, 0]

    def bytes(self) -> int:
        """Of keys, values and what they were computed from."""
        return self.cache.bytes() + sum(part.nbytes for columns in self.columns for part in columns)

    def _compute(self, new: tuple[Tensor, ...], start: int, spread: bool) -> Tensor:
        """Keep columns before ``start``, compute those from there on; -> [B, W - start, D]."""
        self.cache.keep(start)
        self.columns = [tuple(part[:, :start] for part in new)]
        self.whole = bool(new[3][:, :start].all())
        return self._pass(new, start, new[2][:, start:] if spread else None, last=1)

    def _pass(self, new: tuple[Tensor, ...], start: int, sigma: Tensor | None, last: int | None = None) -> Tensor:
        """Read columns ``start`` and on; of the last ``last`` of them, where all are there, the states are wanted."""
        embeddings, positions, _, mask = new = tuple(part[:, start:] for part in new)
        self.whole &= bool(mask.all())
        if self.whole and self.graphs and embeddings.shape[1] == 1 and sigma is None and self.columns:
            self.graph = self.graph or DecodeGraph(self.base, self.cache)
            hidden = self.graph.step(embeddings, positions)
            self.columns.append(new)
            return hidden
        if self.whole:
            hidden = self.base(embeddings, positions, masks.BEHIND, self.cache, sigma, last)
            self.columns.append(new)
            return hidden
        before = [columns[3] for columns in self.columns]
        q = embeddings.shape[1]
        own = masks.causal(q, embeddings.device).expand(len(embeddings), -1, -1, -1) & mask[:, None, None]
        own = own | torch.eye(q, dtype=torch.bool, device=own.device)  # what is not there sees itself, or it were NaN
        seen = torch.cat(before, dim=1)[:, None, None].expand(-1, 1, q, -1) if before else own[..., :0]
        hidden = self.base(embeddings, positions, torch.cat([seen, own], dim=3), self.cache, sigma)
        self.columns.append(new)
        return hidden

    def _common(self, new: tuple[Tensor, ...]) -> Tensor:
        """How many entries of each row are as they were, [B]; what was read is brought into one piece for that."""
        if not self.columns:
            return torch.zeros(len(new[0]), dtype=torch.long, device=new[0].device)
        self._join()
        n = min(new[0].shape[1], self.columns[0][0].shape[1])
        old, new = ([part[:, :n] for part in parts] for parts in (self.columns[0], new))
        same = (old[0] == new[0]).all(2) & (old[1] == new[1]) & (old[2] == new[2]) & old[3] & new[3]
        return same.long().cumprod(1).sum(1)

    def _join(self) -> None:
        """All columns as one part, and in each row those that are there before all others."""
        parts = [torch.cat(part, dim=1) for part in zip(*self.columns, strict=True)]
        mask = parts[3]
        count = int(mask.sum(1).max())
        order = (~mask).long().argsort(dim=1, stable=True)[:, :count]  # [B, M]
        if not torch.equal(order, torch.arange(count, device=order.device).expand_as(order)):
            self.cache.select(order)
            parts = [p.gather(1, order if p.ndim == 2 else order[..., None].expand(-1, -1, p.shape[2])) for p in parts]
        elif count < mask.shape[1]:
            self.cache.keep(count)
            parts = [part[:, :count] for part in parts]
        self.columns, self.whole = [tuple(parts)], bool(parts[3].all())

    def _counts(self) -> Tensor:
        return sum(columns[3].sum(1) for columns in self.columns)
