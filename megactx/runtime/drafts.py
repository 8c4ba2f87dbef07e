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


class Runs:
    """Tokens of which every run of ``MATCH`` and fewer is known by the newest place behind it: no draft is a search."""

    def __init__(self, tokens: list[int]):
        self.tokens: list[int] = []
        self.place: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        place = len(self.tokens)
        for length in range(1, min(MATCH, place) + 1):
            self.place[tuple(self.tokens[place - length : place])] = place
        self.tokens.append(token)

    def behind(self, end: list[int]) -> list[int]:
        """Tokens behind the newest place where the longest end of these stood, ``MATCH`` of them at most."""
        for length in range(min(MATCH, len(end)), 0, -1):
            if place := self.place.get(tuple(end[-length:])):
                return self.tokens[place : place + LONGEST]
        return []


class Lookup(Drafter):
    """Looks for the newest tokens in those before them."""

    def __init__(self, stream):
        super().__init__(stream)
        self.runs = Runs(_where_read(lambda: stream.newest(min(LOOKED, int(stream.lengths[0])))[0].tolist()))

    def draft(self) -> list[int]:
        return self.runs.behind(self.runs.tokens[-MATCH:])

    def took(self, token: int) -> None:
        self.runs.add(token)


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
        self.found = Runs([])  # that block, and the tokens before it

    def draft(self) -> list[int]:
        stream, block = self.stream, self.stream.block
        length, count = int(stream.lengths[0]), int(stream.tree.counts(1)[0])
        # A state is known where the base LM is, a gist where the tree is, which may be some tokens behind.
        end = length // block * block if self.readout else count * block
        if end != self.end and (self.readout is None or end == length):
            among = range(max(0, count - NEWEST), count)
            self.end, self.found = end, Runs(_where_read(lambda: self._look(among)))
        return self.found.behind(stream.newest(MATCH)[0].tolist())

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


def drafter_of(stream) -> Drafter:
    """Of the kind that the stream's settings name."""
    kind = stream.settings.drafts
    if kind in ("nearest", "foretold"):
        return Gists(stream, stream.models.prediction if kind == "foretold" else None)
    return Lookup(stream) if kind == "lookup" else Drafter(stream)
