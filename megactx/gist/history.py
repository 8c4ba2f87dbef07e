"""History mode: every block older than a recency window is compressed at once, as at run time (method 3).

    document   [sink] [ block 1 ] [ block 2 ] ... [ block n ] r0 .......... r(R-1) y0 ....... y(S-1)
    stream     [sink]   gist 1      gist 2   ...    gist n                            once per document
    branch     stream up to gist n                            r0 .......... r(R-1) y0 .... y(S-2)
    scored                                                                         y0 ....... y(S-1)

Gists see the sink and older gists only, so their keys and values are computed once per document and shared by all
branches. Each branch computes its R raw tokens again. It cannot use the teacher's states of them, which know the text
that is compressed. Nor can one pass with a sliding mask serve all: through L layers, raw text leaks from L x R tokens
back.

Shapes: B documents, T tokens, N segments per document, M blocks, S tokens of a segment, R recency, K block, D width.
"""

import torch
from torch import Tensor
from transformers import DynamicCache

from megactx.lm import BaseLM, masks
from megactx.lm.prefill import Prefill, blocks, rows_at

from .carrier import KVSlots, SoftTokens


def check_segments(starts: Tensor, lengths: Tensor, block: int, segment: int, recency: int) -> None:
    """See that every segment lies on the block grid, inside its document, and leaves at least one block to compress.

    Raises:
        ValueError: a size or a segment that does not fit; the message names it.
    """
    for name, value in (("segment", segment), ("recency", recency)):
        if value < block or value % block:
            raise ValueError(f"history.{name}={value} is not allowed: a multiple of block_size={block}")
    bad = (starts % block != 0) | (starts < recency + 2 * block) | (starts + segment > lengths[:, None])
    if bad.any():
        b, n = bad.nonzero()[0].tolist()
        raise ValueError(
            f"segment start {int(starts[b, n])} of document {b} is not eligible: starts are multiples of {block}, at"
            f" least history.recency={recency} + 2 x {block}, and start + history.segment={segment} must not exceed the"
            f" document's {int(lengths[b])} tokens"
        )


def old_blocks(starts: Tensor, block: int, recency: int) -> Tensor:
    """Starts [B, M] of all blocks that are compressed for any of the segments at starts [B, N]."""
    last = int(starts.max()) - recency
    return torch.arange(block, last, block, device=starts.device).expand(len(starts), -1)


def stream(base: BaseLM, prefill: Prefill, old: Tensor, carriers: SoftTokens | KVSlots, block: int):
    """Keys and values per layer of the sink and of the carriers of the blocks at old [B, M]: K + M columns.

    K + M x slots where a block has several vectors.
    """
    if isinstance(carriers, KVSlots):
        return [
            tuple(torch.cat([sink[:, :, :block], slots], dim=2) for sink, slots in zip(cached, layer, strict=True))
            for cached, layer in zip(prefill.cache, carriers.layers, strict=True)
        ]
    vectors, positions = carriers.in_a_row(old)
    sigma = None if carriers.sigma is None else carriers.sigma.expand(positions.shape)
    return read_stream(base, prefill, vectors, positions, sigma, block)


def read_stream(base: BaseLM, prefill: Prefill, vectors: Tensor, positions: Tensor, sigma: Tensor | None, block: int):
    """Keys and values per layer of the sink and, behind it, vectors [B, M, D] at positions [B, M]: K + M columns.

    ``sigma`` [B, M]: standard deviation of these positions in tokens; ``None``: points.
    """
    rows = torch.cat([base.embed(prefill.ids[:, :block]), vectors.to(prefill.hidden.dtype)], dim=1)
    sink = torch.arange(block, device=positions.device).expand(len(positions), -1)
    if sigma is not None:
        sigma = torch.cat([torch.zeros_like(sink, dtype=sigma.dtype), sigma], dim=1)
    cache = DynamicCache()
    base(rows, torch.cat([sink, positions], dim=1), masks.CAUSAL, cache, sigma)
    return [(layer.keys, layer.values) for layer in cache.layers]


def continued(
    base: BaseLM, prefill: Prefill, starts: Tensor, kv_cache, columns: Tensor, raw: int, segment: int
) -> Tensor:
    """Hidden states of segments that read some cached columns, and raw tokens computed again.

    Args:
        starts: segment starts [B, N].
        kv_cache: keys and values per layer.
        columns: how many cached columns each segment sees, [B, N].
        raw: raw tokens in front of each segment.
        segment: S.

    Returns:
        [B, N, S, D]; row i predicts token ``start + i``.
    """
    ids = blocks(prefill.ids, starts - raw, raw + segment - 1)
    positions = (starts - raw)[..., None] + torch.arange(raw + segment - 1, device=starts.device)
    hidden = base.forward_branches(base.embed(ids).to(prefill.hidden.dtype), positions, kv_cache, columns)
    return hidden[:, :, raw - 1 :]


def with_carriers(
    base: BaseLM,
    prefill: Prefill,
    starts: Tensor,
    carriers: SoftTokens | KVSlots,
    block: int,
    segment: int,
    recency: int,
) -> Tensor:
    """The sink, carriers of all blocks of ``old_blocks``, ``recency`` raw tokens: hidden [B, N, S, D]."""
    kv_cache = stream(base, prefill, old_blocks(starts, block, recency), carriers, block)
    # The sink, and the carriers of all of its old blocks.
    columns = block + carriers.slots * ((starts - recency) // block - 1)
    return continued(base, prefill, starts, kv_cache, columns, recency, segment)


def with_nothing(base: BaseLM, prefill: Prefill, starts: Tensor, block: int, segment: int, raw: int) -> Tensor:
    """The sink and ``raw`` tokens before each segment: hidden [B, N, S, D]."""
    return continued(base, prefill, starts, prefill.cache, torch.full_like(starts, block), raw, segment)


def with_everything(prefill: Prefill, starts: Tensor, segment: int) -> Tensor:
    """The full context: hidden [B, N, S, D]."""
    return rows_at(prefill.hidden, starts - 1, segment)
