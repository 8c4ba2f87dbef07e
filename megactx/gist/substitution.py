"""Packed substitution: what a gist costs the base LM, for many blocks of a document at once, exactly (SPEC 3).

    teacher      x0 ........ [ block s ] y0 y1 y2 ... y(H-1)         one pass, its keys and values are kept
    branch k     cache t < s [   gist  ] y0 y1 ... y(H-2)            H rows, original positions
    scored                     y0        y1 y2 ... y(H-1)

Nothing before a block depends on its gist and the base is frozen, so the prefix's keys and values are the teacher's.
A branch is H rows over that cache; all branches of a batch go through the base LM together. A plain loop would run the
whole document once per block.

Shapes: B documents, T tokens, N blocks per document, C carriers, H horizon, K block, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from megactx.lm import BaseLM


@dataclass(frozen=True)
class Teacher:
    """One pass of the base LM over whole documents: final ``hidden`` [B, T, D], keys and values per layer."""

    ids: Tensor  # [B, T]
    hidden: Tensor  # [B, T, D]
    cache: tuple[tuple[Tensor, Tensor], ...]  # per layer, each [B, key-value heads, T, head width]


@torch.no_grad()
def teach(base: BaseLM, ids: Tensor) -> Teacher:
    """Run the frozen base LM over documents ids [B, T]; padding on the right is harmless under causal attention."""
    cache = DynamicCache()
    hidden = base(base.embed(ids), None, cache=cache)
    return Teacher(ids, hidden, tuple((layer.keys, layer.values) for layer in cache.layers))


def blocks(ids: Tensor, starts: Tensor, block: int) -> Tensor:
    """Token ids of blocks: ids [B, T], starts [B, N] -> [B, N, K]."""
    index = starts[..., None] + torch.arange(block, device=ids.device)
    return ids.gather(1, index.flatten(1)).view(*starts.shape, block)


def check_blocks(starts: Tensor, lengths: Tensor, block: int, horizon: int) -> None:
    """Every block must lie on the grid, after the sink block, with its whole horizon inside its document (SPEC 3).

    Raises:
        ValueError: naming the first block that does not.
    """
    if horizon < 1:
        raise ValueError(f"horizon.tokens={horizon} is not allowed: at least 1")
    bad = (starts % block != 0) | (starts < block) | (starts + block + horizon > lengths[:, None])
    if bad.any():
        b, n = bad.nonzero()[0].tolist()
        raise ValueError(
            f"block start {int(starts[b, n])} of document {b} is not eligible: starts are multiples of "
            f"gistnet.block_size={block}, at least {block}, and start + {block} + horizon.tokens={horizon} "
            f"must not exceed the document's {int(lengths[b])} tokens"
        )


def substituted(
    base: BaseLM, teacher: Teacher, starts: Tensor, gists: Tensor, offsets: Sequence[int], block: int, horizon: int
) -> Tensor:
    """Hidden states of branches in which a gist stands for its block.

    Args:
        starts: block starts [B, N].
        gists: [C, B, N, D], C vectors per block, each in a branch of its own.
        offsets: position of each carrier's vector relative to the block's start, C numbers.

    Returns:
        [C, B, N, H, D]; row h predicts token ``start + K + h``.
    """
    c, b, n, d = gists.shape
    continuation = base.embed(blocks(teacher.ids, starts + block, horizon - 1)) if horizon > 1 else None
    rows = gists.permute(1, 2, 0, 3)[:, :, :, None].to(teacher.hidden.dtype)  # [B, N, C, 1, D]
    if continuation is not None:
        continuation = continuation.to(rows.dtype)[:, :, None].expand(b, n, c, horizon - 1, d)
        rows = torch.cat([rows, continuation], dim=3)
    after = torch.arange(horizon - 1, device=starts.device) + block
    first = torch.as_tensor(offsets, device=starts.device)[:, None]
    relative = torch.cat([first, after.expand(c, -1)], dim=1)  # [C, H]
    positions = starts[..., None, None] + relative  # [B, N, C, H]
    hidden = _branches(
        base,
        teacher,
        starts.repeat_interleave(c, dim=1),
        rows.reshape(b, n * c, horizon, d),
        positions.reshape(b, n * c, horizon),
    )
    return hidden.view(b, n, c, horizon, d).permute(2, 0, 1, 3, 4)


def dropped(base: BaseLM, teacher: Teacher, starts: Tensor, block: int, horizon: int) -> Tensor:
    """Hidden states where the block is gone and nothing stands in its place: [B, N, H, D].

    Row 0 is the teacher's row ``start - 1``; the other H - 1 rows keep their original positions.
    """
    first = rows_at(teacher.hidden, starts - 1, 1)
    if horizon == 1:
        return first
    rows = base.embed(blocks(teacher.ids, starts + block, horizon - 1)).to(teacher.hidden.dtype)
    positions = starts[..., None] + block + torch.arange(horizon - 1, device=starts.device)
    return torch.cat([first, _branches(base, teacher, starts, rows, positions)], dim=2)


def rows_at(hidden: Tensor, starts: Tensor, rows: int) -> Tensor:
    """hidden [B, T, D], starts [B, N] -> the ``rows`` states from each start on, [B, N, rows, D]."""
    index = (starts[..., None] + torch.arange(rows, device=hidden.device)).flatten(1)
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1])).view(*starts.shape, rows, -1)


def _branches(base: BaseLM, teacher: Teacher, prefix: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """The packed pass: prefix [B, N], rows [B, N, R, D], positions [B, N, R] -> hidden [B, N, R, D]."""
    order = prefix.argsort(dim=1)  # neighbours in a group of attention then have prefixes of like length
    take = order[..., None].expand_as(positions)
    hidden = base.forward_branches(
        rows.gather(1, take[..., None].expand_as(rows)),
        positions.gather(1, take),
        teacher.cache,
        prefix.gather(1, order),
    )
    return hidden.gather(1, order.argsort(dim=1)[..., None, None].expand_as(hidden))
