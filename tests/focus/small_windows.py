"""Trees with blocks of four, and random windows of them, for the tests of the allocator."""

from functools import cache

import torch

from megactx.focus import Edits, moves
from megactx.memory import MegaContextTree, WorkingContext

K = 4
NEWEST = 8  # protected


class Mean:
    block_size, width = K, 2

    def encode_block(self, children):
        return children.mean(1)

    def offset_in(self, tokens):
        return tokens - 1


@cache
def tree(lengths: tuple[int, ...], levels: int | None = None) -> MegaContextTree:
    table = torch.nn.Embedding(20, 2).requires_grad_(False)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    return MegaContextTree.from_tokens(ids, Mean(), table, torch.tensor(lengths), max_level=levels)


def raw(tree: MegaContextTree, debug: bool = False) -> WorkingContext:
    index = torch.arange(int(tree.lengths.max())).expand(tree.rows, -1)
    index = torch.where(index < tree.lengths[:, None], index, 0)
    return WorkingContext(tree, torch.zeros_like(index), index, tree.lengths, 10**6, debug)


def window(tree: MegaContextTree, seed: int, spare: int = 0) -> WorkingContext:
    """A random one: coarser for some rounds, then some gists are opened again; the fullest row has ``spare`` free."""
    context, generator = raw(tree), torch.Generator().manual_seed(seed)
    for share in (0.8, 0.7, 0.5):
        edits = moves(context, NEWEST).edits(context)
        drawn = torch.rand(len(edits), generator=generator)
        edits = edits[~edits.expand & (drawn < share)]
        context.collapse(edits.lod, edits.index, edits.row)
    row, column = ((context.lod > 0) & (torch.rand(context.lod.shape, generator=generator) < 0.2)).nonzero().unbind(1)
    context.expand(column, row)
    context.budget, context.debug = int(context.counts.max()) + spare, True
    return context


def make_one_by_one(edits: Edits, context: WorkingContext) -> WorkingContext:
    """On a copy, which checks its budget and the eight invariants after each."""
    context = context.copy()
    for at in range(len(edits)):
        edits[at : at + 1].apply(context)
    return context


def expandable(count: int, spare: int) -> WorkingContext:
    """One row, the last ``count`` entries of which are gists, all else is raw."""
    length = (count + 3) * K
    context = raw(tree((length,), 1))
    context.collapse(1, torch.arange(3, count + 3))
    context.budget, context.debug = int(context.counts) + spare, True
    return context
