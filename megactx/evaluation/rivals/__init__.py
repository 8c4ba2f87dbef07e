"""What of a long text stays in the window, one policy a file: ``keep(asked, budget)`` -> ascending token indices.

A policy with ``needs_models`` is built with the models of the study and the folder of ``--keys``. One that has
``say(tokens, over)`` answers by itself over what it kept last.
"""

from dataclasses import dataclass, field

from megactx.focus.finding import FINDS
from megactx.focus.keys import beside, places

SINK, BLOCK, NEWEST = 4, 32, 128


@dataclass
class Asked:
    """Blocks' texts, number of tokens, the blocks that hold needles, the question, and the ids of the text; ids of what
    the base reads before it and behind it, the question among them; how many of the newest tokens those policies read
    that read few; what policies have found and others need too."""

    blocks: list[str]
    tokens: int
    needed: list[int]
    question: str
    ids: list[int] | None = None
    begin: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    newest: int | None = None
    shared: dict = field(default_factory=dict)


def near(order: list[int], count: int) -> list[int]:
    """``beside``, of ``count`` blocks."""
    return [block for block in beside(order) if 0 <= block < count]


def few(asked: Asked, budget: int, order: list[int], count: int = FINDS) -> list[int]:
    """Sink, few of the newest tokens, and of an order of blocks the first ``count`` places before these: no more than
    budget."""
    newest = NEWEST if asked.newest is None else asked.newest
    end = -(-max(0, asked.tokens - newest) // BLOCK)  # blocks that begin before them
    kept = {*range(min(SINK, asked.tokens)), *range(max(0, asked.tokens - newest), asked.tokens)}
    for block in near(places([block for block in order if block < end], count), end):
        more = {*range(block * BLOCK, min(asked.tokens, (block + 1) * BLOCK))} - kept
        kept |= more if len(kept) + len(more) <= budget else set()
    return sorted(kept)[-budget:]


def filled(asked: Asked, budget: int, chosen: list[int], newest: int) -> list[int]:
    """Sink and ``newest`` tokens, whole blocks in the order of their worth, then more of the newest: all of budget."""
    kept = {*range(min(SINK, asked.tokens, budget))}
    kept |= {*range(max(0, asked.tokens - min(newest, budget - len(kept))), asked.tokens)}
    for block in chosen:
        more = {*range(block * BLOCK, min(asked.tokens, (block + 1) * BLOCK))} - kept
        if len(kept) + len(more) <= budget:
            kept |= more
    at = asked.tokens - 1
    while len(kept) < min(budget, asked.tokens):
        kept.add(at)
        at -= 1
    return sorted(kept)
