"""Windows to learn from: random ones, cold starts, and those that LensNet itself arrives at (method 10).

In use LensNet meets windows that its own choices made, and random windows do not look like those. So the LensNet and
the allocator of the moment refocus a share of the windows. All windows are then disturbed a little.
"""

import torch
from torch import Generator, Tensor

from megactx.memory import MegaContextTree, WorkingContext

from .allocator import FocusAllocator
from .edits import Edits, moves
from .layout import by_value
from .lensnet import LensNet

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
    """Make random edits, this many in each row, as far as the budget goes."""
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
    return edits[_first_of_rows(edits, torch.randperm(len(edits), generator=generator), count)]


def measured_share(edits: Edits, count: int, generator: Generator, promise: Tensor | None = None) -> Edits:
    """The edits of each row that are measured: at most ``count``, half of them collapses if there are enough.

    Nearly all edits are worth nothing, so random edits would teach just that. With ``promise``, half of the expands and
    half of the collapses are those that promise most. ``promise`` depends on what LensNet reads, and on nothing else.
    So the choice does not change what LensNet is to estimate: the expected value of an edit, given what it reads.

    Args:
        promise: of each edit, [E]; inf for one that is measured in any case.
    """

    def most(which: Tensor) -> int:
        return int(torch.bincount(edits.row[which]).max()) if which.any() else 0

    collapses = min(count // 2, most(~edits.expand))
    chosen = []
    for kind, share in ((edits.expand, count - collapses), (~edits.expand, collapses)):
        left = kind.nonzero()[:, 0]
        if promise is not None:
            best = _first_of_rows(edits[left], promise[left].argsort(descending=True, stable=True), share // 2)
            chosen.append(left[best])
            share -= share // 2
            left = left[~torch.isin(left, chosen[-1])]
        order = torch.randperm(len(left), generator=generator)
        chosen.append(left[_first_of_rows(edits[left], order, share)])
    return edits[torch.cat(chosen)]


def _first_of_rows(edits: Edits, order: Tensor, count: int) -> Tensor:
    """Places of the first ``count`` edits of each row, in this order [E]; row by row."""
    order = order.to(edits.row.device)
    order = order[torch.argsort(edits.row[order], stable=True)]
    row = edits.row[order]
    place = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    return order[place < count]
