"""Windows, and the tokens that follow them, read in one pass under another attention than plain.

    columns  [ what ``Attention`` makes of the window: entries, under ``mega`` summaries and strips too ][ following ]

Tokens that follow are live under ``mega``: they see every entry, and each other in order. Under ``window`` they see the
sink and what is near, as entries do.

B rows, W entries, N columns of the windows, H scored tokens, D width.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.lm import BaseLM
from megactx.memory import WorkingContext
from megactx.memory.pyramid import Attention


@dataclass(frozen=True)
class AttendedRows:
    """Columns of windows, without those of the tokens that follow."""

    embeddings: Tensor  # [B, N, D], as the tree keeps them
    positions: Tensor  # [B, N]
    mask: Tensor  # bool [B, N, N], True = sees
    sigma: Tensor | None  # [B, N]
    leaf: Tensor  # bool [B, N]: which columns are entries
    stops: Tensor  # [B, N], address behind each column
    entries: Tensor  # [B, W], the column of each entry
    lengths: Tensor  # [B], entries of each row
    ends: Tensor  # [B], tokens of each row
    near: int | None  # tokens that a row sees before it; None: every entry
    sink: int  # tokens that are seen all the same

    @classmethod
    def of(cls, attention: Attention, context: WorkingContext) -> "AttendedRows | None":
        """Of working contexts; ``None`` where attention is plain, which needs none of this."""
        if attention.kind == "plain":
            return None
        encoder, block = context.tree.encoder, context.tree.block_size
        own = (context.lengths, context.ends(), attention.window if attention.kind == "window" else None, block)
        if attention.kind == "window":
            starts, there = context.starts(), context.mask
            entries = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
            spans = (there, starts + context.widths(), entries)
            sigma = encoder.spread(context.lods())
            return cls(context.to_tensor(), context.positions(), attention.near(context), sigma, *spans, *own)
        pyramid = attention.pyramid(context)
        mask = pyramid.mask
        spans = (mask.leaf, mask.end, pyramid.leaves)
        sigma = encoder.spread(pyramid.lod)
        return cls(pyramid.to_tensor(), pyramid.positions(), pyramid.seen(attention.summaries), sigma, *spans, *own)

    def __getitem__(self, which: slice | Tensor) -> "AttendedRows":
        return replace(self, **{name: part[which] for name, part in vars(self).items() if isinstance(part, Tensor)})

    def read(self, base: BaseLM, following: Tensor, entries: Tensor | None = None) -> Tensor:
        """Hidden states that predict the tokens that follow, [B, H, D].

        Args:
            following: ids [B, H]; the last one is only scored.
            entries: embeddings of the entries [B, W, D], in place of those that the tree keeps: a gradient goes into
                them. Summaries stay as they are.
        """
        b, n, d = self.embeddings.shape
        embeddings, more = self.embeddings, following.shape[1] - 1
        if entries is not None:
            there = torch.arange(entries.shape[1], device=entries.device) < self.lengths[:, None]
            row, place = there.nonzero().unbind(1)
            embeddings = embeddings.to(entries.dtype).index_put((row, self.entries[row, place]), entries[row, place])
        addresses = self.ends[:, None] + torch.arange(more, device=following.device)  # of the tokens that are read
        sigma = None if self.sigma is None else F.pad(self.sigma, (0, more))
        hidden = base(
            torch.cat([embeddings, base.embed(following[:, :-1]).to(embeddings.dtype)], dim=1),
            torch.cat([self.positions, addresses.to(self.positions.dtype)], dim=1),
            torch.cat([F.pad(self.mask, (0, more)), self._seen(addresses)], dim=1)[:, None],
            sigma=sigma,
        )
        last = self.entries.gather(1, self.lengths[:, None] - 1)
        scored = torch.cat([last, torch.arange(n, n + more, device=last.device).expand(b, -1)], dim=1)
        return hidden.gather(1, scored[..., None].expand(-1, -1, d))

    def _seen(self, addresses: Tensor) -> Tensor:
        """What tokens at addresses [B, M] behind the windows see, bool [B, M, N + M]."""
        itself = torch.ones_like(addresses, dtype=torch.bool)
        before = itself[:, None].expand(-1, addresses.shape[1], -1).tril()
        seen = torch.cat([self.leaf[:, None].expand(-1, addresses.shape[1], -1), before], dim=2)
        if self.near is None:
            return seen
        stops = torch.cat([self.stops, addresses + 1], dim=1)[:, None]
        return seen & ((stops > addresses[..., None] - self.near + 1) | (stops <= self.sink))
