"""Where a text says word for word what a question names: an identifier, a path, a line of code.

    ... [ uuid of 53cf-be45 is 7d1a-9e02 ] ...  far back  ...  What is the uuid of 53cf-be45?
               |--- a quote ---| behind it, as long again

No key and no encoder tells one identifier from another; its tokens do. A quote is rare: a phrase that stands in many
places says nothing, and a question that was asked before quotes nothing but itself.

T tokens of a text, Q of a question.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LEAST = 8  # tokens of a quote: common phrases are shorter; a power of two
PLACES = 2  # at which it stands, at most: so do ``LEAST`` of its tokens
# Share of a question that is a quote, at most: a UUID is three quarters of the question that asks about it, and what is
# more is the question itself, asked before.
WHOLE = 0.8


class Quote(NamedTuple):
    """Tokens of it, and the first token of each place at which it stands, the oldest first."""

    length: int
    starts: list[int]


def longest_quote(text: Tensor, asked: Tensor) -> Quote | None:
    """The longest run of tokens of a question, [Q], that stands in a text, [T]; ``None``: none that says something.

    Args:
        text: with a negative number where a token was taken away.
    """
    if min(len(text), len(asked)) < LEAST:
        return None
    own, grams = _grams(asked.long()), _grams(text.long())
    at = torch.isin(grams, own).nonzero()[:, 0]
    which, count = grams[at].unique(return_inverse=True, return_counts=True)[1:]
    longest, starts = 0, set()
    for here in at[count[which] <= PLACES].tolist():
        for first in (own == grams[here]).nonzero()[:, 0].tolist():
            behind = _alike(text[here:], asked[first:])
            before = _alike(text[:here].flip(0), asked[:first].flip(0))
            length = before + behind
            if behind >= LEAST and length >= longest:
                starts = {here - before} | (starts if length == longest else set())
                longest = length
    return Quote(longest, sorted(starts)) if 0 < longest <= WHOLE * len(asked) else None


def _alike(text: Tensor, asked: Tensor) -> int:
    """How many tokens at the beginning of both are the same."""
    count = min(len(text), len(asked))
    other = (text[:count] != asked[:count]).nonzero()
    return int(other[0]) if len(other) else count


def _grams(ids: Tensor) -> Tensor:
    """One number for each run of ``LEAST`` tokens [T - LEAST + 1], by doubling; those of other runs may be the same, so
    runs are compared."""
    out, width = ids * 0x9E3779B1 + 1, 1
    while width < LEAST:
        out = out[:-width] * (0x100000001B3 + 2 * width) + out[width:]  # each width its own: order counts
        width *= 2
    return out
