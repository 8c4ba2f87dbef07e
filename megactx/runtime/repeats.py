"""Where the end of a text stood before: what came then may come again, so a window shows it (as in infini-gram, Liu et
al. 2024, and prompt lookup, Saxena 2023). And where its rare tokens stood, see ``rare_tokens``, or what a question
quotes, see ``quotes``.

    ... [ The port of Alder is 4821. ] ...  far back  ... The port of Alder is |
                              ^ the newest place of the longest end

The text is what the tree has of it: tokens that wait for their block do not count, so a session that goes on somewhere
else finds the same.

K tokens of a block.
"""

import torch
from torch import Tensor

from megactx.framework.errors import RunFailed
from megactx.memory import MegaContextTree

from . import rare_tokens
from .quotes import longest_quote
from .rare_tokens import NOTHING

LEAST, LONGEST = 4, 32  # tokens of an end that stood before: fewer say nothing, more need not be counted
LOOKED = 2**20  # newest tokens of a text in which it is looked for
PIECE = 2**14  # of these that are searched at a time, the newest first


class Repeats:
    """Of each row of a tree the blocks where its end, and where its rare tokens stood before.

    Tokens are kept, 4 bytes each, for the tree may have them on a disk.
    """

    def __init__(self, tree: MegaContextTree):
        self.tree = tree
        # Of each row the newest tokens, up to which token of the tree they go, and how much of it was taken away.
        self.known = [(torch.zeros(0, dtype=torch.int32), 0, 0)] * tree.rows

    def blocks(self, row: int) -> list[int]:
        """The block with the next token, and the one beside it to which that token is nearer; none without a place."""
        text, end = self._text(row)
        length, place = longest_end(text)
        if length < LEAST:
            return []
        block, within = divmod(end - len(text) + place, self.tree.block_size)
        other = block + 1 if 2 * within >= self.tree.block_size else block - 1
        return [at for at in (block, other) if 0 <= at < int(self.tree.counts(1)[row])]

    def sharing(self, row: int, newest: int) -> list[list[int]]:
        """Places before that many newest tokens that share rare ones with the end: a block with those beside it."""
        text, end = self._text(row)
        k = self.tree.block_size
        first = max(1, -((len(text) - end) // k))  # whole blocks that are known; block 0 is read anyway
        stop = max(first, min((end - newest) // k, int(self.tree.counts(1)[row])))
        blocks = text[first * k - end + len(text) :][: (stop - first) * k].view(stop - first, k)
        near = [first + at for at in rare_tokens.places(blocks, text[-rare_tokens.ASKS :])]
        stop = int(self.tree.counts(1)[row])
        return [[block for block in (at, at + 1, at - 1) if 0 < block < stop] for at in near]

    def quoted(self, row: int, asked: list[int], began: int) -> list[int]:
        """Blocks that hold what a question quotes, what stands behind it, as long again, and a little around; of the
        newest place first.

        Args:
            asked: ids of the question.
            began: how many tokens of the tree stand behind where it, or its turn, begins.
        """
        text, end = self._text(row)
        text, k = text[: max(0, len(text) - began)], self.tree.block_size
        quote = longest_quote(text, torch.tensor(asked, dtype=torch.int32))
        if quote is None:
            return []
        first, around = end - began - len(text), k // 4
        found: list[int] = []
        for start in reversed(quote.starts):
            stop = min(len(text), start + 2 * quote.length + around)
            found += range((first + max(0, start - around)) // k, (first + stop - 1) // k + 1)
        return [*dict.fromkeys(found)]

    def tokens(self, row: int, blocks: list[int]) -> Tensor:
        """Ids of blocks, as far as they are there and were not taken away."""
        k, end = self.tree.block_size, int(self.tree.lengths[row])
        ids = torch.cat([self._read(row, block * k, min(end, (block + 1) * k)) for block in blocks])
        return ids[ids != NOTHING]

    def newest(self, row: int, count: int) -> Tensor:
        """Ids of the newest tokens of the tree, as far as they are there."""
        text, _ = self._text(row)
        text = text[-count:]
        return text[text != NOTHING]

    def text(self, row: int) -> Tensor:
        """Ids of the newest ``LOOKED`` tokens of the tree, as far as they are there; ``NOTHING`` where one is not."""
        return self._text(row)[0]

    def _text(self, row: int) -> tuple[Tensor, int]:
        """Newest tokens of the tree, and where they end."""
        (known, before, gone), end, compacted = self.known[row], int(self.tree.lengths[row]), self.tree.compacted
        if end < before or gone != compacted:
            known, before = known[:0], max(0, end - LOOKED)
        if end > before:
            known = torch.cat([known, self._read(row, before, end)])[-LOOKED:]
        self.known[row] = known, end, compacted  # in one store: a stop finds all of it, or nothing
        return known, end

    def _read(self, row: int, first: int, end: int) -> Tensor:
        level, k = self.tree.levels[0], self.tree.block_size
        parts = []
        for start in range(first, end, level.size):
            stop = min(end, start + level.size)
            try:
                part = level.span("token", start, stop, slice(row, row + 1))[0].to("cpu", torch.int32)
            except (ValueError, RunFailed):  # a page is damaged or far away: a window that needs it says so
                part = torch.full((stop - start,), NOTHING, dtype=torch.int32)
            if self.tree.compacted:
                floor = self.tree.levels[1].span("floor", start // k, -(-stop // k), slice(row, row + 1))[0].cpu()
                own = torch.arange(start, stop) // k - start // k  # the newest tokens may have no block yet
                part[torch.nn.functional.pad(floor, (0, int(own[-1]) + 1 - len(floor)))[own] > 0] = NOTHING
            parts.append(part)
        return torch.cat(parts)


def longest_end(text: Tensor) -> tuple[int, int]:
    """How many of the last tokens of a text [T] stood in it before, ``LONGEST`` at most, and where the newest place
    ends at which so many did."""
    places, counts = matches(text)
    if not len(places):
        return 0, 0
    most = int(counts.max())
    return most, int(places[counts == most][-1])


def matches(text: Tensor) -> tuple[Tensor, Tensor]:
    """Where the last token of a text [T] stood in it before: the end of each place, [P], the oldest first, and how many
    of the last tokens stood there, [P], ``LONGEST`` at most."""
    found, stop = [(torch.zeros(0, dtype=torch.long),) * 2], len(text)  # places lie before it: each has a token behind
    while stop > 1 and text[-1] != NOTHING:
        first = max(1, stop - PIECE)
        places = (text[first - 1 : stop - 1] == text[-1]).nonzero()[:, 0] + first
        counts, own = torch.ones_like(places), torch.arange(len(places))  # own: that go on
        for length in range(2, LONGEST + 1):
            own = own[places[own] >= length]
            if not len(own) or text[-length] == NOTHING:
                break
            own = own[text[places[own] - length] == text[-length]]
            counts[own] = length
        found.append((places, counts))
        stop = first
    places, counts = zip(*reversed(found), strict=True)
    return torch.cat(places), torch.cat(counts)
