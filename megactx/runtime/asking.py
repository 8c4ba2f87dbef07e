"""What a session asks of its past where windows are earned: what the user said last, by its own words where it quotes
some, else by the keys of blocks; of text that goes on, where its end and its rare tokens stood before.

B rows, Q tokens of a question.
"""

import torch

from megactx.data.user_turns import UserTurns
from megactx.focus.keys import LOOK, Questions, padded, questions_of
from megactx.lm import BaseLM
from megactx.memory import MegaContextTree

from .repeats import Repeats
from .settings import Settings
from .trial import Trial


class Asking:
    """Asks for each row of a tree. What waits to become part of it says nothing: a session that goes on in the middle
    of a block then asks what it had asked.

    Args:
        base: its chat template tells what a user said, and it tries places of rare tokens.
    """

    def __init__(self, tree: MegaContextTree, settings: Settings, base: BaseLM):
        self.tree, self.newest = tree, settings.newest
        self.turns, self.repeats, self.trial = UserTurns.of(base.tokenizer), Repeats(tree), Trial(base)
        self.anyway = settings.budget - tree.block_size  # newest tokens that are read where nothing is found

    def questions(self, first: int) -> Questions:
        """What keys are asked, see ``focus.keys.questions_of``; where what a question quotes, or what nobody asked,
        stood before; how many of the newest tokens are read beside what is found.

        Args:
            first: block 0 of the text among those of all parts.
        """
        tree = self.tree
        counts = tree.lengths.clamp(max=LOOK)
        place = (tree.lengths[:, None] - counts[:, None] + torch.arange(LOOK)).to(tree.device)
        there = torch.arange(LOOK) < counts[:, None]
        row = torch.arange(tree.rows, device=tree.device)[:, None].expand_as(place)[there]
        newest = tree.levels[0].read("token", row, place[there]).split(counts.tolist())
        own, behind, began = zip(*(questions_of(ids.tolist(), self.turns) for ids in newest), strict=True)
        asked = [count is not None for count in behind]
        before = [
            [block for ids in own[row] for block in self.repeats.quoted(row, ids, began[row])]
            if told
            else self._before(row)
            for row, told in enumerate(asked)
        ]
        # Beside what a question quotes, what keys find is about something like it, and takes its place in an answer.
        own = [[] if told and found else ids for told, found, ids in zip(asked, before, own, strict=True)]
        ids, mask = padded([ids for several in own for ids in several])
        which = torch.tensor([row for row, several in enumerate(own) for _ in several], dtype=torch.long)
        repeated = [[first + block for block in blocks] for blocks in before]
        few = self.newest
        beside = [None if few is None or count is None else few + count for count in behind]
        tensors = (part.to(tree.device) for part in (ids, mask, which, torch.tensor(asked)))
        return Questions(*tensors, repeated, [*began] if few == 0 else beside)

    def _before(self, row: int) -> list[int]:
        """Blocks where the end of a row's text stood before, or what is rare in it, if these paid already."""
        blocks = self.repeats.blocks(row)
        if places := self.repeats.sharing(row, self.anyway):
            sink, *texts = (self.repeats.tokens(row, sorted(place)) for place in [[0], *places])
            # What is tried has to fit the window, and so the base: a place is three blocks at most.
            newest = self.repeats.newest(row, self.anyway - 3 * self.tree.block_size)
            pays = self.trial.paying(sink, texts, newest)
            blocks += [block for place, does in zip(places, pays, strict=True) if does for block in place]
        return [*dict.fromkeys(blocks)]
