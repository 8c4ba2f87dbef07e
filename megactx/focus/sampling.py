"""Windows to learn from: random ones, cold starts, and those that LensNet itself arrives at (SPEC 10).

A LensNet that saw only random windows would meet others in use: its own choices change what there is to choose. So a
share of the windows are refocused by the LensNet and the allocator of the moment, and all are then disturbed a little.
"""

import torch
from torch import Generator, Tensor

from megactx.memory import MegaContextTree, WorkingContext

from .allocator import FocusAllocator
from .edits import Edits, moves
from .layout import by_value
from .lensnet import LensNet

FIELDS = ("row", "lod", "index", "expand")  # of ``Edits``
KINDS = ("random", "recency", "policy")
COARSE = 0.25  # share of the nodes of level 2 that stand as one gist in a random window
REFOCUSES, DISTURBED = 6, 2  # at most


def draw(
    kind: str,
    tree: MegaContextTree,
    budget: int,
    generator: Generator,
    lens: LensNet | None = None,
    allocator: FocusAllocator | None = None,
) -> WorkingContext:
    """One window per row of a tree.

    Args:
        kind: of ``KINDS``; ``policy`` needs ``lens`` and ``allocator``, and starts from either of the others.
        budget: the most entries of a row.
        generator: of all choices, on the CPU.

    Raises:
        ValueError: an unknown kind, or the budget is too small for these texts.
    """
    if kind not in KINDS:
        raise ValueError(f"a window of kind {kind} is not known, allowed are {', '.join(KINDS)}")
    if kind == "random" or kind == "policy" and torch.rand((), generator=generator) < 0.5:
        context = _random(tree, budget, generator)
    else:
        context = WorkingContext.recency(tree, budget)
    if kind == "policy":
        for _ in range(int(torch.randint(1, REFOCUSES + 1, (), generator=generator))):
            scores = lens.score(context, moves(context, allocator.protected), allocator.margin(lens.tau))
            allocator.refocus(context, scores.score, scores.price)
    disturb(context, int(torch.randint(DISTURBED + 1, (), generator=generator)), generator)
    return context


def _random(tree: MegaContextTree, budget: int, generator: Generator) -> WorkingContext:
    """Random blocks are raw, some spans of K^2 tokens are one gist, the budget is used up."""
    values = torch.rand(tree.rows, int(tree.counts(1).max()), generator=generator)
    coarse = torch.rand(tree.rows, max(1, int(tree.counts(2).max())), generator=generator) < COARSE
    return by_value(tree, budget, values, coarse)


def disturb(context: WorkingContext, edits: int, generator: Generator) -> None:
    """Make so many random edits in each row, as far as the budget goes: siblings of what was chosen."""
    for _ in range(edits):
        legal = moves(context).edits(context)
        fits = context.lengths[legal.row] + legal.cost(context.tree.block_size) <= context.budget
        legal = legal[fits]
        one_per_row(legal, generator).apply(context)


def one_per_row(edits: Edits, generator: Generator) -> Edits:
    """A random edit of each row that has any."""
    return some_per_row(edits, 1, generator)


def some_per_row(edits: Edits, count: int, generator: Generator) -> Edits:
    """At most ``count`` random edits of each row, in the order of the rows."""
    order = torch.randperm(len(edits), generator=generator).to(edits.row.device)
    order = order[torch.argsort(edits.row[order], stable=True)]
    row = edits.row[order]
    place = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    return edits[order[place < count]]


def measured_share(edits: Edits, count: int, generator: Generator, needed: Tensor | None = None) -> Edits:
    """What is measured of each row: at most ``count``, half of them collapses as far as there are so many.

    Args:
        needed: of which edits more is to be learned than of others, bool [E]: they are measured in any case.
    """
    if needed is not None:
        first, others = edits[needed], measured_share(edits[~needed], count - int(needed.sum()), generator)
        return Edits(*(torch.cat([getattr(first, n), getattr(others, n)]) for n in FIELDS))

    def counts(which: Tensor) -> int:
        return int(torch.bincount(edits.row[which]).max()) if which.any() else 0

    collapses = min(count // 2, counts(~edits.expand))
    expands = count - collapses
    opened = some_per_row(edits[edits.expand], expands, generator)
    closed = some_per_row(edits[~edits.expand], collapses, generator)
    return Edits(*(torch.cat([getattr(opened, n), getattr(closed, n)]) for n in FIELDS))
