"""Packed substitution: what a gist costs the base LM, for many blocks of a document at once, exactly (method 3).

    teacher      x0 ........ [ block s ] y0 y1 y2 ... y(H-1)         one pass, its keys and values are kept
    branch k     cache t < s [   gist  ] y0 y1 ... y(H-2)            H rows, original positions
    scored                     y0        y1 y2 ... y(H-1)

Nothing before a block depends on its gist and the base is frozen, so the prefix's keys and values are the teacher's.
A branch is H rows over that cache; all branches of a batch go through the base LM together. A plain loop would run the
whole document once per block.

Shapes: B documents, T tokens, N blocks per document, C carriers, H horizon, K block, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megactx.lm import BaseLM
from megactx.lm.prefill import Prefill, blocks, rows_at


def check_blocks(starts: Tensor, lengths: Tensor, block: int, horizon: int, first: Tensor | int = 0) -> None:
    """See that every block lies on the grid, behind the sink, with its whole horizon inside its document (method 3).

    Args:
        first: of ``Prefill``.

    Raises:
        ValueError: a block that does not; the message names the first.
    """
    if horizon < 1:
        raise ValueError(f"horizon.tokens={horizon} is not allowed: at least 1")
    least = (torch.zeros_like(lengths)[:, None] + first).clamp(min=block)  # [B, 1]
    bad = (starts % block != 0) | (starts < least) | (starts + block + horizon > lengths[:, None])
    if bad.any():
        b, n = bad.nonzero()[0].tolist()
        raise ValueError(
            f"block start {int(starts[b, n])} of document {b} is not eligible: starts are multiples of "
            f"block_size={block}, at least {int(least[b])}, and start + {block} + horizon.tokens={horizon} "
            f"must not exceed the document's {int(lengths[b])} tokens"
        )


def substituted(
    base: BaseLM,
    prefill: Prefill,
    starts: Tensor,
    gists: Tensor,
    offsets: Sequence[int],
    block: int,
    horizon: int,
    sigmas: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Hidden states of branches in which a gist, or several, stand for their block.

    Args:
        starts: block starts [B, N].
        gists: [C, B, N, D], C vectors per block, each in a branch of its own; or [C, B, N, M, D], M in each branch.
        offsets: position of each carrier's vectors relative to the block's start, C numbers, or C lists of M.
        block: tokens of a block, K, or K^n where gists of LOD n stand for so many.
        sigmas: standard deviation of these positions in tokens, C scalars; ``None``: points, as those of tokens.

    Returns:
        [C, B, N, H, D]; row h predicts token ``start + K + h``.
    """
    gists = gists if gists.ndim == 5 else gists[:, :, :, None]  # [C, B, N, M, D]
    c, b, n, m, d = gists.shape
    # The last token of the horizon is only predicted, so H - 1 tokens are read: [B, N, H - 1, D].
    continuation = base.embed(blocks(prefill.ids, starts + block, horizon - 1)) if horizon > 1 else None
    rows = gists.permute(1, 2, 0, 3, 4).to(prefill.hidden.dtype)  # [B, N, C, M, D]
    if continuation is not None:
        # Carriers of a block share its continuation; their branches never see each other.
        continuation = continuation.to(rows.dtype)[:, :, None].expand(b, n, c, horizon - 1, d)
        rows = torch.cat([rows, continuation], dim=3)  # [B, N, C, R, D], R = M + H - 1
    # Relative to the block's start. Tokens behind the block keep their places; a gist takes one place of its block's K.
    after = torch.arange(horizon - 1, device=starts.device) + block  # [H - 1]
    first = torch.as_tensor(offsets).to(starts.device, non_blocking=True).view(c, m)
    relative = torch.cat([first, after.expand(c, -1)], dim=1)  # [C, R]
    positions = starts[..., None, None] + relative  # [B, N, C, R]
    hidden = _branches(
        base,
        prefill,
        starts.repeat_interleave(c, dim=1),  # [B, N * C]: a block's carriers are neighbours, their prefixes are alike
        rows.flatten(1, 2),  # [B, N * C, R, D]
        positions.flatten(1, 2),  # [B, N * C, R]
        sigma=_sigma(sigmas, m, positions),
    )
    # The last of the M gists predicts the first token behind the block; the others predict nothing that is scored.
    hidden = hidden.view(b, n, c, m + horizon - 1, d)[..., m - 1 :, :]  # [B, N, C, H, D]
    return hidden.permute(2, 0, 1, 3, 4)


def dropped(base: BaseLM, prefill: Prefill, starts: Tensor, block: int, horizon: int) -> Tensor:
    """Hidden states where the block is gone and nothing stands in its place: [B, N, H, D].

    Row 0 is the teacher's row ``start - 1``; the other H - 1 rows keep their original positions.
    """
    first = rows_at(prefill.hidden, starts - 1, 1)
    if horizon == 1:
        return first
    rows = base.embed(blocks(prefill.ids, starts + block, horizon - 1)).to(prefill.hidden.dtype)
    positions = starts[..., None] + block + torch.arange(horizon - 1, device=starts.device)
    return torch.cat([first, _branches(base, prefill, starts, rows, positions)], dim=2)


def slotted(base: BaseLM, prefill: Prefill, starts: Tensor, slots, block: int, horizon: int) -> Tensor:
    """Hidden states of branches in which keys and values at every layer stand for the block.

    Args:
        starts: block starts [B, N].
        slots: keys and values per layer, each [B, key-value heads, N, head width].

    Returns:
        [B, N, H - 1, D]: row h - 1 predicts token ``start + K + h``, h = 1..H-1. Slots have no output of their own, so
        no row predicts h = 0.

    Raises:
        ValueError: a horizon of 1, which leaves nothing to score.
    """
    if horizon < 2:
        raise ValueError(
            f"horizon.tokens={horizon} is not allowed: keys and values are scored from the second token on"
        )
    rows = base.embed(blocks(prefill.ids, starts + block, horizon - 1)).to(prefill.hidden.dtype)
    positions = starts[..., None] + block + torch.arange(horizon - 1, device=starts.device)
    return _branches(base, prefill, starts, rows, positions, slots)


def _sigma(sigmas: Sequence[Tensor | None] | None, vectors: int, positions: Tensor) -> Tensor | None:
    """The sigma of each row, [B, N * C, R]: that of the carrier for the M gists of its branch, 0 for tokens."""
    b, n, c, r = positions.shape
    if sigmas is None or all(sigma is None for sigma in sigmas):
        return None
    point = torch.zeros((), device=positions.device)
    first = torch.stack([point if sigma is None else sigma for sigma in sigmas])[:, None]  # [C, 1]
    wide = torch.arange(r, device=positions.device) < vectors
    return torch.where(wide, first, 0.0).expand(b, n, c, r).flatten(1, 2)


def _branches(
    base: BaseLM,
    prefill: Prefill,
    cache_len: Tensor,
    rows: Tensor,
    positions: Tensor,
    slots=None,
    sigma: Tensor | None = None,
) -> Tensor:
    """The packed pass: cache_len [B, N], rows [B, N, R, D], positions and sigma [B, N, R] -> hidden [B, N, R, D]."""
    # A group of attention reads as many cached columns as the longest prefix in it. Sorted by prefix, the branches of a
    # group need nearly the same number, and few columns are computed only to be masked.
    order = cache_len.argsort(dim=1)  # [B, N]
    take = order[..., None].expand_as(positions)  # [B, N, R]
    if slots is not None:
        index = order[:, None, :, None]  # [B, 1, N, 1], for parts [B, key-value heads, N, head width]
        slots = [tuple(part.gather(2, index.expand_as(part)) for part in layer) for layer in slots]
    hidden = base.forward_branches(
        rows.gather(1, take[..., None].expand_as(rows)),  # [B, N, R, D]
        positions.gather(1, take),  # [B, N, R]
        prefill.cache,
        cache_len.gather(1, order),  # [B, N], ascending
        slots=slots,
        sigma=None if sigma is None else sigma.gather(1, take),
    )
    # ``argsort`` of a permutation is its inverse: the branches go back to where the caller has them.
    return hidden.gather(1, order.argsort(dim=1)[..., None, None].expand_as(hidden))
