"""What of a window is read: the newest tokens, unless LensNet's own estimate puts something older above them.

    the newest tokens alone    [ sink ][ c0 ][ c1 ][ c2 ] ... [ newest ]     all of the budget, chunks of K tokens
    with two sets that earn    [ sink ][ set ][ set ][ c2 ] ... [ newest ]   each pays with the oldest chunk there is

Blocks that a question finds by their keys (see ``finding``) come before all sets: no level of the window has to be
opened for them. One that is among the newest tokens stays where these give way. Where few of the newest tokens are to
be read beside them (``Found.newest``) there is room for all, and nothing else earns any:

    with found blocks, and few of the newest    [ sink ][ block ][ block ] ... [ newest ]

A set is K siblings of the window, tokens or gists, and is worth their v_keep. A chunk is worth what LensNet says of its
blocks: v_keep where they stand raw in the window, v_down where a gist stands for them. Room that a short text leaves
beside parts is worth nothing, and is taken first. The best set takes the place of
the oldest chunk if it is worth more by a margin, then the second best that of the next. So by LensNet's estimate what
is read is never worse than the newest tokens. A gist that belongs to no whole set has no estimate, and earns nothing.

B rows, W entries, K of a block, C chunks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megactx.memory import Composite, MegaContextTree, Selection, WorkingContext

from .edits import Moves
from .lensnet import Scores


class Found(NamedTuple):
    """Of each row what is read in any case: blocks, the best first, if they can be read; how many of them, at most,
    take the place of newest tokens; how many of the newest tokens are read beside them, ``None``: all that have room.
    """

    blocks: list[list[int]]
    most: list[int]
    newest: list[int | None]


@torch.no_grad()
def earned(
    context: WorkingContext,
    budget: int,
    legal: Moves,
    scores: Scores | None,
    margin: float | Tensor,
    protected: int,
    found: Found | None = None,
) -> tuple[Selection, Tensor, list[list[int]]]:
    """What is read of a window, how many of its entries were earned against the newest tokens, [B], and which blocks of
    ``found`` are among these, those of each row.

    Args:
        budget: entries that are read, W; a multiple of nothing, but more than K.
        legal: of ``moves`` for ``context``.
        scores: of ``context``; ``None``: there is no estimate, so nothing is earned.
        margin: nats by which a set must be worth more.
        protected: newest tokens that no set takes the place of.
    """
    tree, k, sink = context.tree, context.tree.block_size, context.tree.sink
    ends = context.stops().cpu()  # [B], addresses like all that follow
    closed = _closed(context)  # presets are read in any case
    budget -= len(closed)
    # Where as many newest tokens would begin as have room: of a short text before its first, and that room costs none.
    wide, first_own = ends - (budget - k), torch.full_like(ends, sink + k)
    if found is None:
        found = Found([[]] * len(ends), [0] * len(ends), [None] * len(ends))
    blocks = [_readable(tree, row, own) for row, own in enumerate(found.blocks)]
    if isinstance(tree, Composite):
        blocks = [_first_of_each(tree, blocks[0])]
    few = few_from(context, found.newest)
    few = torch.where((few > wide) & torch.tensor([bool(these) for these in blocks]), few, 0)
    least = torch.maximum(first_own, few)
    chunks = ((torch.maximum(ends - protected, least) - wide) // k).clamp(min=0)  # that have room, or may be paid with
    limits = torch.minimum(chunks, torch.tensor(found.most))
    chosen = [_chosen(*row, k) for row in zip(blocks, wide.tolist(), least.tolist(), limits.tolist(), strict=True)]
    opened, kept = [own for own, _ in chosen], [own for _, own in chosen]
    paid = torch.tensor([len(own) for own in opened])
    few[torch.tensor([not (old or new) for old, new in chosen])] = 0  # there is nothing beside which they would be read
    begin = torch.maximum(wide + k * paid, torch.maximum(first_own, few)).minimum(ends)
    stops = [
        min([end - protected, *(block * k for block in own)]) for end, own in zip(ends.tolist(), kept, strict=True)
    ]
    free = ((begin - wide) // k - paid).clamp(min=0)  # chunks that nobody has to pay with
    chunks, count = free + ((torch.tensor(stops) - begin) // k).clamp(min=0), torch.zeros_like(begin)
    chunks[few > 0] = 0
    if scores is not None:
        starts, spans = context.starts(), context.widths() * k
        first = begin.to(starts.device)[:, None]
        oldest = torch.maximum(wide, first_own).minimum(ends).to(starts.device)[:, None]
        candidate = legal.leads & (starts != sink) & (starts + spans <= oldest)
        for row, own in enumerate(opened):  # what is read already, and what stands above it
            for block in own:
                candidate[row] &= (starts[row] + spans[row] <= block * k) | (starts[row] >= (block + 1) * k)
        worth = _within_shares(context, torch.where(candidate, scores.v_keep, -torch.inf), opened[0])
        best, column = worth.sort(dim=1, descending=True, stable=True)  # among equals the oldest
        chunk = _chunks(context, scores, legal, first - k * free.to(first.device)[:, None], int(chunks.max()))
        chunk[torch.arange(chunk.shape[1], device=chunk.device) < free.to(chunk.device)[:, None]] = 0.0
        there = torch.arange(chunk.shape[1], device=chunk.device) < chunks.to(chunk.device)[:, None]
        both = min(best.shape[1], chunk.shape[1])
        wins = (best[:, :both] > chunk[:, :both].clamp(min=0) + margin) & there[:, :both]
        count = wins.long().cumprod(1).sum(1).cpu()
    rows = []
    starts = begin + k * (count - free).clamp(min=0)
    for row, (end, start, sets) in enumerate(zip(ends.tolist(), starts.tolist(), count.tolist(), strict=True)):
        old = [(0, block * k) for block in opened[row]]
        old += [(int(context.lod[row, at]), int(context.index[row, at])) for at in (column[row, :sets] if sets else [])]
        # A block that was found may reach into the newest tokens, which are there anyway.
        runs = [(level, torch.arange(index, index + k if level else min(index + k, start))) for level, index in old]
        pieces = [(int(index[0]) * k**level, (torch.full_like(index, level), index)) for level, index in runs]
        pieces += [(index * k**level, (torch.tensor([level]), torch.tensor([index]))) for level, index in closed]
        pieces.append((sink, _tokens(sink, min(sink + k, end))))
        pieces.append((start, _tokens(start, end)))
        pieces = [piece for _, piece in sorted(pieces, key=lambda piece: piece[0])]
        rows.append([torch.cat(piece) for piece in zip(*pieces, strict=True)])
    lengths = torch.tensor([len(lod) for lod, _ in rows])
    lod, index = (torch.nn.utils.rnn.pad_sequence([row[n] for row in rows], batch_first=True) for n in (0, 1))
    return Selection(tree, lod, index, lengths, budget + len(closed)), (count + paid) * k, opened


def _readable(tree: MegaContextTree | Composite, row: int, blocks: list[int]) -> list[int]:
    """Those that have not been taken away, without block 0, which is read anyway."""
    at = torch.tensor(blocks, dtype=torch.long, device=tree.device)
    may = tree.openable(torch.full_like(at, row), torch.ones_like(at), at).tolist()
    return [
        block for block, readable in zip(blocks, may, strict=True) if readable and block != tree.sink // tree.block_size
    ]


def _chosen(found: list[int], begin: int, least: int, most: int, k: int) -> tuple[list[int], list[int]]:
    """Of found blocks, the best first, as many as have room: those that stand before the newest tokens, and those among
    them. Each of the former takes the room of K newest tokens, the oldest ones if any are there, which may make a
    former of a latter.

    Args:
        begin: of as many newest tokens as have room where none is opened.
        least: from where on they are read at most.
        most: that may stand before them.
    """
    taken, paid = [], 0
    for block in found:
        more, before, count = [*taken, block], -1, paid
        while count > before:
            before, count = count, sum(at * k < max(begin + count * k, least) for at in more)
        if count <= most:
            taken, paid = more, count
    first = max(begin + paid * k, least)
    return [at for at in taken if at * k < first], [at for at in taken if at * k >= first]


def newest_from(context: WorkingContext, budget: int) -> Tensor:
    """Where the newest tokens begin that are read if nothing is earned: addresses [B]."""
    k, ends = context.tree.block_size, context.stops().cpu()
    room = budget - len(_closed(context)) - k
    return torch.minimum((ends - room).clamp(min=context.tree.sink + k), ends)


def few_from(context: WorkingContext, newest: list[int | None]) -> Tensor:
    """Where so many newest tokens begin: addresses [B]; 0 where nobody said how many."""
    ends, first = context.stops().cpu(), context.tree.sink + context.tree.block_size
    few = torch.tensor([0 if count is None else count for count in newest])
    there = torch.tensor([count is not None for count in newest])
    return torch.where(there, (ends - few).clamp(min=first), 0)


def _closed(context: WorkingContext) -> list[tuple[int, int]]:
    """Nodes of a window that are of closed parts."""
    if not isinstance(tree := context.tree, Composite):
        return []
    number = tree.part_of(context.starts()[0, : int(context.counts[0])])
    there = [part.closed for part in tree.parts] + [False]
    here = torch.tensor(there, device=number.device)[number].nonzero().squeeze(1)
    return [*zip(context.lod[0, here].tolist(), context.index[0, here].tolist(), strict=True)]


def _first_of_each(tree: Composite, blocks: list[int]) -> list[int]:
    """The same blocks without those for which their part's share has no room."""
    room, out = [*(cap // tree.block_size for cap in tree.caps), len(blocks)], []
    numbers = tree.part_of(torch.tensor(blocks, dtype=torch.long, device=tree.device) * tree.block_size).tolist()
    for block, number in zip(blocks, numbers, strict=True):
        room[number] -= 1
        if room[number] >= 0:
            out.append(block)
    return out


def _within_shares(context: WorkingContext, worth: Tensor, opened: list[int]) -> Tensor:
    """The same without sets, [B, W], for which their part's share has no room."""
    if not isinstance(tree := context.tree, Composite):
        return worth
    k, number = tree.block_size, tree.part_of(context.starts()[0])
    read = torch.tensor(opened, dtype=torch.long, device=number.device) * k
    for place, cap in enumerate(tree.caps):
        room = max(0, cap // k - int((tree.part_of(read) == place).sum()))
        here = (number == place) & worth[0].isfinite()
        best = torch.where(here, worth[0], -torch.inf).argsort(descending=True, stable=True)
        worth[0, best[room : int(here.sum())]] = -torch.inf
    return worth


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
