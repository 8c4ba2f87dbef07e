"""What of a window is read: the newest tokens, unless LensNet's own estimate puts something older above them.

    the newest tokens alone    [ sink ][ c0 ][ c1 ][ c2 ] ... [ newest ]     all of the budget, chunks of K tokens
    with two sets that earn    [ sink ][ set ][ set ][ c2 ] ... [ newest ]   each pays with the oldest chunk there is

A set is K siblings of the window, tokens or gists, and is worth their v_keep. A chunk is worth what LensNet says of its
blocks: v_keep where they stand raw in the window, v_down where a gist stands for them. The best set takes the place of
the oldest chunk if it is worth more by a margin, then the second best that of the next. So by LensNet's estimate what
is read is never worse than the newest tokens. A gist that belongs to no whole set has no estimate, and earns nothing.

B rows, W entries, K of a block, C chunks.
"""

import torch
from torch import Tensor

from megactx.memory import Selection, WorkingContext

from .edits import Moves
from .lensnet import Scores


@torch.no_grad()
def earned(
    context: WorkingContext, budget: int, legal: Moves, scores: Scores | None, margin: float | Tensor, protected: int
) -> tuple[Selection, Tensor]:
    """What is read of a window, and how many of its entries were earned against the newest tokens, [B].

    Args:
        budget: entries that are read, W; a multiple of nothing, but more than K.
        legal: of ``moves`` for ``context``.
        scores: of ``context``; ``None``: there is no estimate, so nothing is earned.
        margin: nats by which a set must be worth more.
        protected: newest tokens that no set takes the place of.
    """
    tree, k = context.tree, context.tree.block_size
    ends = context.ends().cpu()  # [B]
    begin = torch.minimum((ends - (budget - k)).clamp(min=k), ends)  # of the newest tokens
    count = torch.zeros_like(begin)
    if scores is not None:
        starts, spans = context.starts(), context.widths() * k
        first = begin.to(starts.device)[:, None]
        candidate = legal.leads & (starts >= k) & (starts + spans <= first)
        worth = torch.where(candidate, scores.v_keep, -torch.inf)
        best, column = worth.sort(dim=1, descending=True, stable=True)  # among equals the oldest
        chunks = ((ends - begin - protected) // k).clamp(min=0)  # that may be paid with
        chunk = _chunks(context, scores, legal, first, int(chunks.max()))
        there = torch.arange(chunk.shape[1], device=chunk.device) < chunks.to(chunk.device)[:, None]
        most = min(best.shape[1], chunk.shape[1])
        wins = (best[:, :most] > chunk[:, :most].clamp(min=0) + margin) & there[:, :most]
        count = wins.long().cumprod(1).sum(1).cpu()
    rows = []
    for row, (end, start, sets) in enumerate(zip(ends.tolist(), begin.tolist(), count.tolist(), strict=True)):
        parts = [_tokens(0, min(k, end))]
        for at in sorted(column[row, :sets].tolist()) if sets else []:
            level, index = int(context.lod[row, at]), int(context.index[row, at])
            parts.append((torch.full((k,), level), torch.arange(index, index + k)))
        parts.append(_tokens(start + sets * k, end))
        rows.append([torch.cat(part) for part in zip(*parts, strict=True)])
    lengths = torch.tensor([len(lod) for lod, _ in rows])
    lod, index = (torch.nn.utils.rnn.pad_sequence([row[n] for row in rows], batch_first=True) for n in (0, 1))
    return Selection(tree, lod, index, lengths, budget), count * k


def _tokens(start: int, end: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(max(0, end - start), dtype=torch.long), torch.arange(start, max(start, end))


def _chunks(context: WorkingContext, scores: Scores, legal: Moves, first: Tensor, count: int) -> Tensor:
    """What each chunk of K tokens from ``first`` [B, 1] on is worth, [B, C]: the most that LensNet says of an entry in
    it; inf where it says nothing of tokens that stand there."""
    k = context.tree.block_size
    raw = context.lod == 0
    keep = torch.where(legal.first >= 0, scores.v_keep, torch.inf)
    value = torch.where(raw, keep, torch.where(legal.expand, scores.v_down, torch.inf))
    out = value.new_full((len(value), count), -torch.inf)
    begins, ends = context.starts(), context.starts() + context.widths()
    for c in range(count):
        low, high = first + c * k, first + (c + 1) * k
        inside = context.mask & (begins < high) & (ends > low)
        out[:, c] = torch.where(inside, value, -torch.inf).amax(1)
    return out
