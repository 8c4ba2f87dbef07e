"""What a history's readout expects, and whether that came: a block is foretold where the one before it ends.

    state at the end of block n -> gist of block n + 1      told once the tree has that block

A session decodes in pieces that need not end where blocks do, so every state that is read is looked at.

B rows, N tokens, D width, K tokens of a block.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megactx.framework.errors import RunFailed
from megactx.memory import MegaContextTree
from megactx.memory.prediction import NEWEST, Readout, expected, rank_of

NEAR = 8  # blocks that are told as near


@dataclass(frozen=True)
class Foretold:
    """What the readout says at one refocus. Where pages of the tree cannot be read it says nothing."""

    rank: Tensor  # [B, 2] reciprocal rank of the block that came, by the readout and by its control; NaN: there is none
    state: Tensor | None = field(repr=False)  # [B, D] of the newest tokens; None: they were not read
    blocks: Tensor = field(repr=False)  # [B] of each history
    readout: Readout = field(repr=False)
    tree: MegaContextTree = field(repr=False)

    def near(self, row: int = 0) -> list[tuple[int, float]]:
        """Blocks of the newest ``NEWEST`` that are nearest to what is expected next, and their cosines; the nearest
        first. Only who asks pays for it."""
        if self.state is None:
            return []
        count = int(self.blocks[row])
        among = range(max(0, count - NEWEST), count)
        try:
            return expected(self.readout, self.tree, self.state[row], NEAR, row, among)
        except (ValueError, RunFailed):  # a page is damaged or far away: the window says so where it needs it
            return []


class Foretelling:
    """Remembers states at the ends of blocks until the blocks behind them are there.

    Args:
        readout: of the next gist.
        tree: the history's own.
    """

    def __init__(self, readout: Readout, tree: MegaContextTree):
        self.readout, self.tree = readout, tree
        self.states: dict[tuple[int, int], Tensor] = {}  # (row, block that comes) -> [D]

    def hear(self, states: Tensor, before: Tensor, after: Tensor) -> None:
        """Final hidden states [B, N, D] of the tokens from ``before`` [B] to ``after`` [B] of each history."""
        ends = before[:, None] + torch.arange(1, states.shape[1] + 1)  # [B, N], tokens up to each state
        known = (ends % self.tree.block_size == 0) & (ends <= after[:, None])
        for row, column in known.nonzero().tolist():
            block = int(ends[row, column]) // self.tree.block_size
            self.states[row, block] = states[row, column].clone()  # a graph writes over its states

    def told(self, state: Tensor | None) -> Foretold:
        """After a refocus, with final hidden states of the newest tokens, [B, D]; ``None``: they were not read."""
        blocks, rank = self.tree.counts(1), torch.full((self.tree.rows, 2), torch.nan)
        for row, block in [(row, block) for row, block in self.states if block < blocks[row]]:
            try:
                rank[row] = rank_of(self.readout, self.tree, row, block, self.states.pop((row, block)))
            except (ValueError, RunFailed):  # as above
                pass
        return Foretold(rank, None if state is None else state.clone(), blocks, self.readout, self.tree)
