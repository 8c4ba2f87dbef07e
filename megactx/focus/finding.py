"""What a question finds in a tree: places, each a block and those beside it.

    all blocks  -- keys -->  a few likest places  -- second look -->  the likest, and what was told later of the same

Keys of 64 numbers find the right place among the first few of thousands, but not which of these it is. Where they read
the states of a sentence encoder, that reads the few places again and its states are compared as they are, token by
token: what else stands in a piece says nothing against it. It reads pieces of three quarters of a block. Then a place
is the blocks that the likest piece reaches, and no more.

What is alike confuses a base LM: each place more has another number, name or date, and it tells the last. So one is
opened. Where that one has a word of the question that no other place has, and what is likest of all others stands
later, that is opened too: it may be told again there, in other words, and what is told again counts as it was told
last.

B rows, K of a block, Q tokens of a question.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megactx.memory import Composite, MegaContextTree, WorkingContext

from .earned import few_from, newest_from
from .keys import Questions, beside, places, search

LOOKS, AMONG = 8, 128  # places that keys find, among so many blocks; among more the root of that as many
MARGIN = 4  # of a block: so much of it may belong to a fact that the likest piece has not whole
ALIKE = 0.5  # mean of its tokens' cosines from which on a question is about a text, in whatever words
FINDS = 2  # places that are opened at most, and by those keys that read nothing again


def found_by_keys(
    context: WorkingContext, questions: Questions, most: int, budget: int, protected: int
) -> list[list[int]]:
    """Of each row the blocks that a question finds, the best first.

    Of what a user asked ``FINDS`` places at most, and not all that there is room for. Of other text the most like
    block, if it stands out. A fact often crosses a border, so each brings the blocks beside it, or those that its
    likest piece reaches.

    Args:
        most: blocks that may take the place of newest tokens.
        budget, protected: see ``earned``. What is read however many are opened is not looked for; and of text that goes
            on none of the newest blocks, which are most like its newest tokens and would take the places of all others.
    """
    tree, k = context.tree, context.tree.block_size
    begin, stops = newest_from(context, budget), context.stops().cpu()
    before = torch.where(questions.asked.cpu(), torch.minimum(begin + most * k, stops - protected), begin)
    before = torch.maximum(before, few_from(context, questions.newest))
    # Of a block that goes on behind this, as one in which a question begins, keys that look again read what is before.
    looks = questions.asked.cpu() & tree.keys.looks_again
    after = before + (k - 1) * looks
    found = [_search(own, questions) for own in getattr(tree, "trees", [tree])]
    first = [base // tree.block_size for base in getattr(tree, "bases", [0])]  # block 0 of each tree
    likes, out = torch.cat(found, dim=1), []
    block = torch.cat([torch.arange(part.shape[1]) + at for part, at in zip(found, first, strict=True)])
    there = range(len(block) + 1)
    if isinstance(tree, Composite):  # what may not be opened is not found either
        level = torch.ones_like(block)
        closed = ~tree.openable(torch.zeros_like(block), level.to(tree.device), block.to(tree.device))
        likes, there = likes.masked_fill(closed, -torch.inf), {*block[~closed.cpu()].tolist()}
    for number, row in enumerate(likes):
        row = row.masked_fill(((block + 1) * k > after[number]).to(row.device), -torch.inf)
        order = row.argsort(descending=True, stable=True)
        count = looked_at(int(row.isfinite().sum()))
        if questions.asked[number]:
            best = block[order[row[order].isfinite()][: 3 * count + 1].cpu()]  # of which three may be beside each other
            # The block in which the question begins is like it by that, and no less a place; but the place of none.
            partly = (best + 1) * k > before[number]
            likest = places(best[~partly].tolist(), count) + best[partly].tolist()
        else:  # more than one costs text that goes on more than they give
            likest = block[order[:1][row[order[:1]] > tree.keys.null].cpu()].tolist()
        if looks[number] and likest:
            around = torch.tensor(beside(likest))
            around = around[torch.isin(around, block[row.isfinite().cpu()])].sort().values.tolist()
            asked = questions.of(number)
            seen = second_look(tree, number, around, asked, int(before[number]))
            words = set().union(*(tree.keys.words(ids.tolist()) for ids in asked))
            opened = [at for block in told_last(seen, words) for at in [block, *reached(seen[block].start, k)]]
        else:
            opened = beside(places(likest, FINDS))
        out.append([at for at in dict.fromkeys(opened) if at in there])
    return out


def looked_at(blocks: int) -> int:
    """Places that keys find among so many blocks: the more there are, the more stand above the right one by chance."""
    return int(LOOKS * max(1.0, blocks / AMONG) ** 0.5)


class Seen(NamedTuple):
    """The likest piece of a block: how like, where it begins, its words."""

    like: float
    start: int
    words: set


def told_last(seen: dict[int, Seen], asked: set) -> list[int]:
    """The likest block, and the next likest place, if what the first says may be told again there.

    Args:
        seen: by block.
        asked: words of the question.
    """
    order = places(sorted(seen, key=lambda block: seen[block].like, reverse=True), len(seen))
    if len(order) < 2:
        return order
    first, second, *others = order
    own = (asked & seen[first].words).difference(*(seen[block].words for block in others))
    return [first, second] if own and second > first and seen[second].like >= ALIKE else [first]


def second_look(
    tree: MegaContextTree | Composite, row: int, blocks: list[int], asked: list[Tensor], end: int
) -> dict[int, Seen]:
    """The piece of each block that is likest to the likest of some questions, by what the keys' own encoder says of
    those of which it holds the middle.

    Args:
        blocks: in their order; a piece lies in one of them, or in two that are beside each other.
        asked: ids of the questions, [Q] each.
        end: of the text that is asked for; no piece reaches beyond it.
    """
    k = tree.block_size
    size, step = 3 * k // 4, max(1, k // 4)
    starts = [start for block in blocks for start in range(block * k, (block + 1) * k, step)]
    pieces = [
        range(start, start + size) for start in starts if (start + size - 1) // k in blocks and start + size <= end
    ]
    if not pieces:
        return {}
    place = torch.tensor([at for piece in pieces for at in piece], device=tree.device)
    ids = tree.levels[0].read("token", torch.full_like(place, row), place).view(len(pieces), size)
    best: dict[int, tuple[float, int]] = {}
    for number, value in enumerate(tree.keys.alike(ids, asked).tolist()):
        block = pieces[number][size // 2] // k
        if block not in best or value > best[block][0]:
            best[block] = value, number
    return {
        block: Seen(value, pieces[number][0], tree.keys.words(ids[number].tolist()))
        for block, (value, number) in best.items()
    }


def reached(start: int, k: int) -> range:
    """Blocks that a piece reaches, and a little around it."""
    size, around = 3 * k // 4, k // MARGIN
    return range(max(0, start - around) // k, (start + size - 1 + around) // k + 1)


def _search(tree: MegaContextTree, questions: Questions) -> Tensor:
    """``search``, without what was taken away: it cannot be read."""
    like = search(tree, questions.ids, questions.mask, questions.row)
    return like.masked_fill(tree.levels[1].whole("floor") > 0, -torch.inf) if tree.compacted else like
