"""Drafts: what may come next, read along with the newest token (speculative decoding, Leviathan et al. 2023).

    none       nothing: every token is a pass of the base LM
    lookup     tokens behind the newest place where the newest tokens stood before (prompt lookup, Saxena 2023)
    nearest    tokens of the block behind the one whose gist is nearest to the newest gist
    foretold   tokens of the block whose gist is nearest to the one that a readout foretells

A token of a draft counts where the very same one is chosen at its place, greedy or drawn. A draft says one token for
each place, so that happens with the probability that the base LM gives it, and what is said is what would be said
without drafts.

K tokens of a block.
"""

from collections.abc import Callable

from megactx.framework.errors import RunFailed
from megactx.memory.prediction import NEWEST, Readout, directions, expected

LONGEST, MATCH = 8, 3  # tokens of a draft, and newest tokens that are looked for
LOOKED = 8192  # newest tokens in which they are looked for


class Drafter:
    """Says what may follow the one row of a stream; this one nothing.

    Args:
        stream: as far as it has come.
    """

    def __init__(self, stream):
        self.stream = stream

    def draft(self) -> list[int]:
        """Up to ``LONGEST`` tokens that may follow."""
        return []

    def took(self, token: int) -> None:
        """A token is part of the history now."""


class Lookup(Drafter):
    """Every run of ``MATCH`` tokens and fewer is known by the newest place behind it, so a draft costs no search."""

    def __init__(self, stream):
        super().__init__(stream)
        self.tokens = _where_read(lambda: stream.newest(min(LOOKED, int(stream.lengths[0])))[0].tolist())
        self.behind: dict[tuple[int, ...], int] = {}
        for place in range(1, len(self.tokens)):
            self._note(place)

    def draft(self) -> list[int]:
        for length in range(min(MATCH, len(self.tokens)), 0, -1):
            if (place := self.behind.get(tuple(self.tokens[-length:]))) is not None:
                return self.tokens[place : place + LONGEST]
        return []

    def took(self, token: int) -> None:
        self._note(len(self.tokens))
        self.tokens.append(token)

    def _note(self, place: int) -> None:
        for length in range(1, min(MATCH, place) + 1):
            self.behind[tuple(self.tokens[place - length : place])] = place


class Gists(Drafter):
    """Tokens of one past block, which gists point to.

    Args:
        stream: with a tree.
        readout: of the next gist; ``None``: the newest gist is what is looked for, and what stood behind it the draft.
    """

    def __init__(self, stream, readout: Readout | None = None):
        super().__init__(stream)
        self.readout = readout
        self.end = -1  # token at which the block that is drafted begins
        self.found: list[int] = []  # that block, and the tokens before it

    def draft(self) -> list[int]:
        stream, block = self.stream, self.stream.block
        length, count = int(stream.lengths[0]), int(stream.tree.counts(1)[0])
        # A state is known where the base LM is, a gist where the tree is, which may be some tokens behind.
        end = length // block * block if self.readout else count * block
        if end != self.end and (self.readout is None or end == length):
            among = range(max(0, count - NEWEST), count)
            self.end, self.found = end, _where_read(lambda: self._look(among))
        return behind_match(stream.newest(MATCH)[0].tolist(), self.found)

    def _look(self, among: range) -> list[int]:
        tree, block = self.stream.tree, self.stream.block
        if self.readout is not None:
            self.stream.logits()  # what waits is read
            near = [index for index, _ in expected(self.readout, tree, self.stream.hidden[0], 1, 0, among)]
        else:
            index, gists = directions(tree, 0, among, 0)
            # The newest block has nothing behind it, nor has one whose next one was taken away.
            followed = (index[1:] == index[:-1] + 1).nonzero()[:, 0]
            near = [int(index[followed][(gists[followed] @ gists[-1]).argmax()]) + 1] if len(followed) else []
        return [
            token
            for begin in (place * block for place in near)
            for token in tree.levels[0].span("token", max(0, begin - MATCH), begin + block)[0].tolist()
        ]


def _where_read(read: Callable[[], list[int]]) -> list[int]:
    """What it reads; nothing where a page is damaged or far away: the window says so where it needs it."""
    try:
        return read()
    except (ValueError, RunFailed):
        return []


def behind_match(tokens: list[int], where: list[int]) -> list[int]:
    """What stands in ``where`` behind the newest place of the longest end of ``tokens``, ``MATCH`` tokens at most."""
    for length in range(min(MATCH, len(tokens)), 0, -1):
        end = tokens[-length:]
        for at in range(len(where) - length - 1, -1, -1):
            if where[at : at + length] == end:
                return where[at + length : at + length + LONGEST]
    return []


def drafter_of(stream) -> Drafter:
    """Of the kind that the stream's settings name."""
    kind = stream.settings.drafts
    if kind in ("nearest", "foretold"):
        return Gists(stream, stream.models.prediction if kind == "foretold" else None)
    return Lookup(stream) if kind == "lookup" else Drafter(stream)
