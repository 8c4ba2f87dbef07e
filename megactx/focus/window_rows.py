"""Rows that the base LM reads: the entries of a working context, and behind them the tokens that follow.

B rows, W entries, H scored tokens, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.lm import BaseLM, masks
from megactx.memory import WorkingContext


@dataclass(frozen=True)
class WindowRows:
    """Columns of each row: W of entries, padded on the right, and behind the padding H - 1 of tokens that follow."""

    embeddings: Tensor  # [B, W + H - 1, D]
    positions: Tensor  # [B, W + H - 1]
    sigma: Tensor | None  # [B, W + H - 1]
    lengths: Tensor  # [B], entries of each row
    order: Tensor  # [B, W + H - 1]: the column above that each column of the pass takes; padding comes last
    horizon: int  # H

    def read(self, base: BaseLM, cache=None) -> Tensor:
        """One causal pass of the base LM over all rows, in the order of the pass: hidden [B, W + H - 1, D]."""
        return base(
            taken(self.embeddings, self.order),
            taken(self.positions, self.order),
            masks.CAUSAL,
            cache,
            None if self.sigma is None else taken(self.sigma, self.order),
        )

    def scored(self, hidden: Tensor) -> Tensor:
        """hidden of ``read`` -> the states that predict the tokens that follow, [B, H, D]."""
        return taken(hidden, self.lengths[:, None] - 1 + torch.arange(self.horizon, device=self.lengths.device))


def rows_of(base: BaseLM, context: WorkingContext, following: Tensor) -> WindowRows:
    """Rows of working contexts, with the gists that their tree keeps; see ``lay_out``."""
    entries = (context.to_tensor(), context.positions(), context.lods(), context.lengths, context.ends())
    return lay_out(base, *entries, following, context.tree.encoder)


def lay_out(
    base: BaseLM,
    entries: Tensor,
    positions: Tensor,
    lods: Tensor,
    lengths: Tensor,
    ends: Tensor,
    following: Tensor,
    encoder,
) -> WindowRows:
    """Rows at absolute positions.

    Args:
        entries: embeddings of the entries, [B, W, D].
        positions, lods: of the entries, [B, W].
        lengths, ends: entries of each row, and the tokens that they stand for, [B].
        following: ids of the tokens that come next, [B, H]; the last one is only scored.
        encoder: its ``spread`` says how wide the positions of gists are.

    Raises:
        ValueError: ids of another number of rows.
    """
    b, w, _ = entries.shape
    if following.ndim != 2 or len(following) != b or following.shape[1] < 1:
        raise ValueError(f"following has shape {list(following.shape)}, expected [{b}, H] with H at least 1")
    horizon, spread = following.shape[1], getattr(encoder, "spread", None)
    after = torch.arange(horizon - 1, device=following.device)
    sigma = spread(lods) if spread is not None else None
    place, length = torch.arange(w + horizon - 1, device=following.device).expand(b, -1), lengths[:, None]
    return WindowRows(
        embeddings=torch.cat([entries, base.embed(following[:, :-1])], dim=1),
        positions=torch.cat([positions, ends[:, None] + after], dim=1),
        sigma=None if sigma is None else F.pad(sigma, (0, horizon - 1)),
        lengths=lengths,
        order=torch.where(place < length, place, w + place - length).clamp(max=w + horizon - 2),
        horizon=horizon,
    )


def taken(tensor: Tensor, index: Tensor) -> Tensor:
    """tensor [B, S, ...], index [B, M] -> [B, M, ...]."""
    return tensor[torch.arange(len(index), device=index.device)[:, None], index]
