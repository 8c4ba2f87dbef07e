"""Recall behind a mixed context: one old block is in tokens, all others are compressed, and it comes back (method 4).

    [sink] gist 1 ... gist j-1 [ block j ] gist j+1 ... gist n  r0 .. r(R-1) | block j again
                                                                               scored

A working context expands a block for the sake of its exact words. Gists that never stood beside a copy in training get
in the way of it: recall of an expanded block is 0.63 among such gists, and 0.76 with nothing around it. With a weight
of 0.1 of this loss it is 0.74; with 0.03 it is 0.69, and nothing else gets worse (RESULTS.md, exact recall).

Shapes: B documents, N cases per document, M old blocks, K block, R recency, D width.
"""

import torch
from torch import Tensor

from megactx.lm import BaseLM
from megactx.lm.prefill import Prefill, blocks, rows_at

from .carrier import SoftTokens


def mixed(
    base: BaseLM,
    prefill: Prefill,
    starts: Tensor,
    copied_blocks: Tensor,
    old: Tensor,
    carriers: SoftTokens,
    block: int,
    recency: int,
) -> Tensor:
    """Hidden states that predict the block at ``copied_blocks`` when it comes again at ``starts``: [B, N, K, D].

    Args:
        starts: where it comes again [B, N], on the block grid.
        copied_blocks: start of the block that is in tokens [B, N], one of the old ones.
        old: starts of all blocks that are compressed for any case [B, M], see ``history.old_blocks``.
        carriers: of the old blocks.
        recency: R, raw tokens before ``starts``.
    """
    b, n = starts.shape
    length, compressed = prefill.ids.shape[1], old.shape[1]
    # Cases differ in how many gists stand in front of the told block and behind it, so no slice serves them all. One
    # pool holds all that a case can read, the document's tokens and then the vectors. A case is a list of places in it.
    vectors = carriers.vectors.to(prefill.hidden.dtype)
    pool = torch.cat([base.embed(prefill.ids).to(vectors.dtype), vectors], dim=1)  # [B, T + M, D]
    # Old blocks of a case, and which of them is copied.
    many, at = (starts - recency) // block - 1, copied_blocks // block - 1
    # Rows of the six parts of a case. Of the copy the last token is only predicted, so K - 1 of it are read.
    parts = (torch.full_like(at, block), at, torch.full_like(at, block), many - 1 - at)
    parts = (*parts, torch.full_like(at, recency), torch.full_like(at, block - 1))
    ends = torch.stack(parts, dim=-1).cumsum(dim=-1)  # [B, N, 6]: sink, gists, tokens, gists, raw, the copy
    column = torch.arange(int(ends[..., -1].max()), device=starts.device).expand(b, n, -1)  # [B, N, W]
    # A column is in the part whose number is how many parts end at or before it: [B, N, W], 6 in the padding.
    part = (column[..., None] >= ends[..., None, :]).sum(dim=-1)
    # Its place within the part, [B, N, W]: the part begins where the one before it ends.
    inside = column - torch.cat([torch.zeros_like(ends[..., :1]), ends], dim=-1).gather(2, part)
    nothing = torch.zeros_like(at)

    def of(*values: Tensor) -> Tensor:  # one value [B, N] per part -> [B, N, W]
        return torch.stack([*values, nothing], dim=-1).gather(2, part)

    # Where each part begins in the pool. Gist i of the pool is that of old block i, so those behind the told one go on
    # at ``at + 1``. The copy reads the told block's own tokens once more.
    place = (
        of(nothing, nothing + length, copied_blocks, length + at + 1, starts - recency, copied_blocks) + inside
    )  # [B, N, W]
    place = place.where(part < 6, 0)
    is_gist = (part == 1) | (part == 3)
    which = (place - length).clamp(0, compressed - 1)  # of the M gists; anything where it is none
    at_gist = (old + carriers.offset)[:, None].expand(-1, n, -1).gather(2, which)  # [B, N, W]
    # A token's place in the pool is its position in the document. Only the copy stands elsewhere, from ``starts`` on.
    position = torch.where(is_gist, at_gist, place + of(*[nothing] * 5, starts - copied_blocks))
    # [B, N, W, D]
    rows = pool.gather(1, place.flatten(1)[..., None].expand(-1, -1, pool.shape[-1])).view(*place.shape, -1)
    sigma = None if carriers.sigma is None else torch.where(is_gist, carriers.sigma, 0.0).flatten(0, 1)
    lengths = ends[..., -1].flatten()
    hidden = base.read(rows.flatten(0, 1), position.flatten(0, 1), lengths, sigma)
    # The last K rows predict the copy: the last raw token its first token, the copy's K - 1 tokens the rest.
    scored = (lengths - block)[:, None] + torch.arange(block, device=starts.device)  # [B * N, K]
    taken = hidden.gather(1, scored[..., None].expand(-1, -1, hidden.shape[-1]))  # [B * N, K, D]
    return taken.view(b, n, block, -1)


@torch.no_grad()
def full(base: BaseLM, prefill: Prefill, starts: Tensor, copied_blocks: Tensor, block: int) -> Tensor:
    """Hidden states behind the full context that predict ``copied_blocks`` again at ``starts``: [B, N, K, D]."""
    first = rows_at(prefill.hidden, starts - 1, 1)
    if block == 1:
        return first
    steps = torch.arange(block - 1, device=starts.device)
    rows = base.embed(blocks(prefill.ids, copied_blocks, block - 1)).to(prefill.hidden.dtype)
    again = base.forward_branches(rows, starts[..., None] + steps, prefill.cache, starts)
    return torch.cat([first, again], dim=2)
