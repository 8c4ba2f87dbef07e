"""A working context under MegaAttention, or a sliding window, in several passes that never make a mask of all pairs.

    far        the sink and all summaries: they see nothing else
    segments   each with its strip, several side by side: they see what is far and themselves
    live       behind all leaves, of which it sees all

What a row does not see is not computed, so time grows with what is seen. Rounding aside the states are those of one
pass under the whole mask. Nothing here has a gradient.

B rows of a batch, W entries, N columns, G segments side by side, F columns that are far, D width.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from megactx.lm import BaseLM, masks

if TYPE_CHECKING:
    from .pyramid import Pyramid
    from .working_context import WorkingContext

SIDE_BY_SIDE = 1 << 22  # pairs of a mask: as many segments at once as have them
ROWS = 1024  # of a pass of a sliding window

KeysValues = list[tuple[Tensor, Tensor]]  # per layer, each [B, heads, columns, head width]


@torch.no_grad()
def by_segments(
    pyramid: "Pyramid", base: BaseLM, summaries: bool = True, kept: list[KeysValues] | None = None
) -> Tensor:
    """Final hidden states of the entries [B, W, D], 0 in the padding; as ``Pyramid.read`` gives them.

    Args:
        summaries: whether they are seen.
        kept: gets keys and values of the entries of each row of the batch, [1, heads, its entries, head width].
    """
    context, columns = pyramid.context, pyramid.to_tensor()
    positions, sigma = pyramid.positions(), context.tree.encoder.spread(pyramid.lod)
    found = columns.new_zeros(columns.shape)
    for row in range(len(columns)):
        rows = _Rows(base, columns[row], positions[row], None if sigma is None else sigma[row])
        for at, hidden in _read(pyramid, row, rows, summaries):
            found[row, at] = hidden.to(found.dtype)
        if kept is not None:
            kept.append(rows.leaves)
    hidden = found.gather(1, pyramid.leaves[..., None].expand(-1, -1, found.shape[-1]))
    return torch.where(context.mask[..., None], hidden, 0.0)


@torch.no_grad()
def by_rows(context: "WorkingContext", base: BaseLM, window: int) -> Tensor:
    """The same where each entry sees the sink and those that begin or end among the ``window`` newest tokens."""
    columns, positions, sigma = context.to_tensor(), context.positions(), context.tree.encoder.spread(context.lods())
    ends, found = context.starts() + context.widths(), columns.new_zeros(columns.shape)
    for row, count in enumerate(context.counts.tolist()):
        rows = _Rows(base, columns[row], positions[row], None if sigma is None else sigma[row])
        start, end = context.starts()[row, :count], ends[row, :count]
        kept, cached = None, columns.new_zeros(0, dtype=torch.long, device=columns.device)
        for first in range(0, count, ROWS):
            own = torch.arange(first, min(first + ROWS, count), device=columns.device)
            seen = torch.cat([cached, own])
            near = (end[seen] > start[own, None] - window + 1) | (end[seen] <= context.tree.block_size)
            hidden, kept = rows.read(own[None], (near & (seen <= own[:, None]))[None], kept)
            found[row, own] = hidden[0].to(found.dtype)
            if own[-1] + 1 < count:
                oldest = start[own[-1] + 1] - window + 1
                still = ((end[seen] > oldest) | (end[seen] <= context.tree.block_size)).nonzero()[:, 0]
                cached, kept = seen[still], [(k[:, :, still], v[:, :, still]) for k, v in kept]
    return torch.where(context.mask[..., None], found, 0.0)


class _Rows:
    """Columns of one row of a batch: embeddings [N, D], positions [N], spreads [N] or ``None``.

    ``leaves``: keys and values of all entries, once they are read.
    """

    def __init__(self, base: BaseLM, embeddings: Tensor, positions: Tensor, sigma: Tensor | None):
        self.base, self.embeddings, self.positions, self.sigma = base, embeddings, positions, sigma
        self.leaves: KeysValues | None = None

    def read(self, at: Tensor, mask: Tensor | str, kept: KeysValues | None) -> tuple[Tensor, KeysValues]:
        """Columns at [G, R] behind others, mask bool [G, R, S + R] -> states [G, R, D], all keys and values."""
        cache = DynamicCache() if kept is None else DynamicCache(ddp_cache_data=kept)
        mask = mask[:, None] if isinstance(mask, Tensor) else mask
        sigma = None if self.sigma is None else self.sigma[at]
        hidden = self.base(self.embeddings[at], self.positions[at], mask, cache, sigma)
        return hidden, [(layer.keys, layer.values) for layer in cache.layers]


def _read(pyramid: "Pyramid", row: int, rows: _Rows, summaries: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """-> (columns [R], their states [R, D]) of every pass."""
    mask, device = pyramid.mask, rows.embeddings.device
    there, live = mask.there[row], mask.is_live[row]
    sink = mask.leaf[row] & (mask.end[row] <= mask.block) & ~live
    far = ((mask.summary[row] & there) | sink).nonzero()[:, 0]
    own = (there & ~live & ~sink & ~mask.summary[row]).nonzero()[:, 0]
    leaves = mask.leaf[row].nonzero()[:, 0]
    place = torch.full_like(there, -1, dtype=torch.long)
    place[leaves] = torch.arange(len(leaves), device=device)  # among the leaves
    newest = live.nonzero()[:, 0]

    def seen(wanted: Tensor, columns: Tensor) -> Tensor:
        kind, sees = mask.kinds(row, wanted)
        if not summaries:
            sees = sees & ~mask.summary[row]
        return (sees[:, columns][kind] & (columns <= wanted[:, None])) | (columns == wanted[:, None])

    held: KeysValues | None = None  # of the leaves that are not live, in their order

    def hold(columns: Tensor, made: KeysValues) -> None:
        """Columns [M] and of each layer their keys and values [heads, M, head width]."""
        nonlocal held
        if held is None:
            count = len(leaves) - len(newest)
            held = [tuple(p.new_zeros(1, p.shape[0], count, p.shape[2]) for p in layer) for layer in made]
        for layer, new in zip(held, made, strict=True):
            for part, other in zip(layer, new, strict=True):
                part[0, :, place[columns]] = other

    kept: KeysValues | None = None
    if len(far):
        hidden, kept = rows.read(far[None], seen(far, far)[None], None)
        yield far, hidden[0]
        mine = sink[far]
        if mine.any():
            hold(far[mine], [tuple(p[0, :, mine] for p in layer) for layer in kept])
    for group in _groups(own, mask.segments()[row, own], len(far)):
        padded = pad_sequence(group, batch_first=True, padding_value=-1)
        at, fits = padded.clamp(min=0), padded >= 0
        sees = torch.zeros(*padded.shape, len(far) + padded.shape[1], dtype=torch.bool, device=device)
        for index, part in enumerate(group):
            sees[index, : len(part), : len(far) + len(part)] = seen(part, torch.cat([far, part]))
        itself = torch.arange(padded.shape[1], device=device)
        sees[:, itself, len(far) + itself] = True  # padding sees itself
        cache = kept and [tuple(p.expand(len(group), -1, -1, -1) for p in layer) for layer in kept]
        hidden, made = rows.read(at, sees, cache)
        yield padded[fits], hidden[fits]
        new = fits & mask.leaf[row][at]
        hold(padded[new], [tuple(p[:, :, len(far) :].transpose(1, 2)[new].transpose(0, 1) for p in x) for x in made])
    if len(newest):
        hidden, held = rows.read(newest[None], masks.BEHIND if held else masks.CAUSAL, held)
        yield newest, hidden[0]
    rows.leaves = held


def _groups(own: Tensor, segment: Tensor, far: int) -> Iterator[list[Tensor]]:
    """Columns [R] by their segment, in groups of about ``SIDE_BY_SIDE`` pairs."""
    _, number, counts = segment.unique(return_inverse=True, return_counts=True)
    parts = own[torch.argsort(number, stable=True)].split(counts.tolist())
    group: list[Tensor] = []
    for part in parts:
        most = max(len(part), *(len(other) for other in group)) if group else len(part)
        if group and (len(group) + 1) * most * (far + most) > SIDE_BY_SIDE:
            yield group
            group = []
        group.append(part)
    if group:
        yield group
