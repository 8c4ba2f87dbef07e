"""Where the end of a text stood before: what came then may come again, so a window shows it (as in infini-gram, Liu et
al. 2024, and prompt lookup, Saxena 2023).

    ... [ The port of Alder is 4821. ] ...  far back  ... The port of Alder is |
                              ^ the newest place of the longest end

B rows, K tokens of a block.
"""

import torch
from torch import Tensor

from megactx.memory import MegaContextTree

LEAST, LONGEST = 4, 32  # tokens of an end that stood before: fewer say nothing, more need not be counted
REPEATED = 2  # blocks that are read for it, at most
LOOKED = 2**20  # newest tokens of a text in which it is looked for


class Repeats:
    """Of each row of a tree the blocks where its end stood before.

    Tokens are kept, 4 bytes each, for the tree may have them on a disk.
    """

    def __init__(self, tree: MegaContextTree):
        self.tree = tree
        self.known = [torch.zeros(0, dtype=torch.int32)] * tree.rows  # the tree's newest tokens of each row
        self.lengths = [0] * tree.rows  # tokens of the tree up to which they are known

    def blocks(self, row: int, newest: Tensor) -> list[int]:
        """The block with the next token, and that beside it to which this token is nearer; none where it has no place.

        Args:
            newest: ids of the row's end, ``LONGEST`` or all that there are; those that the tree has not yet, too.
        """
        text, first = self._text(row)
        length, place = longest_end(text, newest.to(text))
        if length < LEAST:
            return []
        block, within = divmod(first + place, self.tree.block_size)
        other = block + 1 if 2 * within >= self.tree.block_size else block - 1
        return [at for at in (block, other) if 0 <= at < int(self.tree.counts(1)[row])]

    def _text(self, row: int) -> tuple[Tensor, int]:
        """Newest tokens of the tree, and the place of the first of them."""
        known, before, now = self.known[row], self.lengths[row], int(self.tree.lengths[row])
        last = known[-2 * LONGEST :]  # of a tree that was shortened and went on otherwise
        if now < before or not torch.equal(last, self._read(row, before - len(last), before)):
            known, before = known[:0], max(0, now - LOOKED)
        text = torch.cat([known, self._read(row, before, now)])[-LOOKED:]
        self.known[row], self.lengths[row] = text, now
        return text, now - len(text)

    def _read(self, row: int, first: int, stop: int) -> Tensor:
        return self.tree.levels[0].span("token", first, stop, slice(row, row + 1))[0].to("cpu", torch.int32)


def longest_end(text: Tensor, newest: Tensor) -> tuple[int, int]:
    """How many of the newest tokens stood in a text before, ``LONGEST`` at most, and where the newest such place ends.

    Args:
        text: ids [T]; its own end, where it is what is looked for, is no place.
        newest: ids [N], the end of the text and what has come since.
    """
    ends = torch.arange(1, max(1, len(text)))  # places behind a token that has another behind it
    count = place = 0
    for back in range(min(LONGEST, len(newest))):
        ends = ends[ends > back]
        ends = ends[text[ends - 1 - back] == newest[-1 - back]]
        if not len(ends):
            break
        count, place = back + 1, int(ends[-1])
    return count, place
