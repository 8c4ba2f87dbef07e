"""Reads a window again, and computes only the entries that are new in it: ``reuse=approximate`` (method 19).

Behind an edit all keys and values know of what was there before. Exact reading computes them again, which is most of
what a session reads. Here they stay as they are, as if a reader had read on without looking back; so what a session
says depends a little on what its windows were. What that costs is in RESULTS.md.

An entry is kept where its embedding, its position and its spread are those of a column that was read. Beyond the
positions of the base LM an edit moves what is squeezed, so less is kept there. Squeezed by address, as under
MegaAttention, 98 % would be kept in place of 66 %, but that costs 0.02 nat a token, twelve times as much.

B rows, W entries of a window, C kept columns, Q entries that are computed, D width.
"""

import torch
from torch import Tensor

from .incremental_prefill import IncrementalPrefill


class ApproximatePrefill(IncrementalPrefill):
    """As ``IncrementalPrefill``, but keys and values outlast edits before them."""

    @torch.no_grad()
    def read(self, embeddings: Tensor, positions: Tensor, lengths: Tensor, sigma: Tensor | None = None) -> Tensor:
        if not self.current():
            self.forget()
        if not self.columns:
            return super().read(embeddings, positions, lengths, sigma)
        new = self.given(embeddings, positions, lengths, sigma)
        self._join()
        place, kept = matched(self.columns[0], new)
        self.lengths = lengths.cpu()
        if bool((kept == new[3]).all()) and torch.equal(self._counts(), lengths):
            self.reused = self.lengths
            return self.hidden
        kept.scatter_(1, (lengths - 1)[:, None], False)  # its state is wanted
        try:
            self.hidden = self._mend(new, place, kept, sigma is not None)
        except BaseException:
            self.forget()
            raise
        self.reused = kept.sum(1).cpu()
        return self.hidden

    def _mend(self, new: tuple[Tensor, ...], place: Tensor, kept: Tensor, spread: bool) -> Tensor:
        """Keep some columns, compute all other entries behind them; -> the state of the last entry of each row."""
        before, there = _first(kept)
        now, there_now = _first(new[3] & ~kept)
        self.cache.select(_of(place, before).clamp(min=0))
        # Columns are in no order of the text, so each row says which of them stand before it.
        seen = (before[:, None] <= now[..., None]) & there[:, None]  # [B, Q, C]
        own = (now[:, None] <= now[..., None]) & there_now[:, None]
        own = own | torch.eye(now.shape[1], dtype=torch.bool, device=now.device)  # what is not there sees itself
        computed = (*(_of(part, now) for part in new[:3]), there_now)
        hidden = self.base(
            computed[0],
            computed[1],
            torch.cat([seen, own], dim=2)[:, None],
            self.cache,
            computed[2] if spread else None,
        )
        self.columns = [(*(_of(part, before) for part in new[:3]), there), computed]
        self.whole = bool(there.all()) and bool(there_now.all())
        last = there_now.sum(1) - 1
        return hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]


def matched(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Columns and entries, as ``given`` makes them -> the column of each entry [B, W], and whether it has one."""
    top = torch.iinfo(torch.long).max
    ranked, order = old[1].masked_fill(~old[3], top).sort(dim=1, stable=True)
    at = torch.searchsorted(ranked, new[1].contiguous()).clamp(max=ranked.shape[1] - 1)
    place = order.gather(1, at)
    kept = new[3] & (ranked.gather(1, at) == new[1])
    kept &= (_of(old[0], place) == new[0]).all(2) & (_of(old[2], place) == new[2])
    return place, kept


def _first(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B, W] -> indices of what is chosen, in order, [B, N], N of the fullest row; and which of them are there."""
    count = int(chosen.sum(1).max())
    index = (~chosen).long().argsort(dim=1, stable=True)[:, :count]
    return index, chosen.gather(1, index)


def _of(part: Tensor, index: Tensor) -> Tensor:
    """part [B, W] or [B, W, D] at index [B, N]."""
    return part.gather(1, index if part.ndim == 2 else index[..., None].expand(-1, -1, part.shape[2]))
