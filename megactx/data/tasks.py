"""Conversations with one right answer each: small tasks that a program sets and solves.

    recall   something is told in the first turn, other tasks follow, and it is asked for at the end
    look up  one value of a list         copy  a line, word by word       last   of some words
    sort     words by the alphabet       add   two numbers of two digits

What is asked is always in the conversation, or follows from it: a model that answers uses its context.
"""

from collections.abc import Iterator

import numpy as np

from megactx.framework.config.types import Count, Seed

from .conversations import Conversations

WORDS = (
    "amber basil cedar delta ember fjord grove hazel ivory jade kelp linen maple north olive pearl quartz river slate"
    " tulip umber violet willow yarrow zinc"
).split()
THINGS = ("code", "colour", "city", "number", "password", "animal", "river", "month")
RULES = 1


class Tasks(Conversations):
    """Generated tasks, each a function of (seed, index).

    Args:
        conversations: how many.
        seed: of what is drawn.
    """

    def __init__(self, conversations: Count = 8000, seed: Seed = 0):
        if conversations < 1:
            raise ValueError(f"stage.tasks={conversations} is not allowed: 1 or more")
        self.conversations, self.seed = conversations, seed

    def fingerprint(self) -> str:
        return f"tasks {RULES} {self.conversations} {self.seed}"

    def documents(self) -> Iterator[dict]:
        """Dicts of ``messages`` and ``source``."""
        for index in range(self.conversations):
            rng = np.random.default_rng([self.seed, index])
            pairs = recall(rng, int(rng.integers(1, 4))) if index % 3 == 0 else _others(rng, int(rng.integers(1, 4)))
            yield {"messages": turns_of(pairs), "source": f"task {index}"}


def recall(rng, between: int, first: bool = True) -> list[tuple[str, str]]:
    """Questions and answers: a fact is told, ``between`` other tasks follow, and it is asked for.

    Args:
        first: it is told in the first turn; else behind a long one, for what drops old text keeps the very first.
    """
    thing, value = str(rng.choice(THINGS)), f"{rng.choice(WORDS)} {rng.integers(10, 100)}"
    told = (f"Remember this: my {thing} is {value}.", f"Your {thing} is {value}.")
    before = []
    if not first:
        words = " ".join(rng.permutation(WORDS))
        before = [(f"Copy: {words}", words)]
    return [*before, told, *_others(rng, between), (f"What is my {thing}?", f"Your {thing} is {value}.")]


def turns_of(pairs: list[tuple[str, str]]) -> list[dict]:
    """Questions with their answers as turns."""
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _others(rng, count: int) -> list[tuple[str, str]]:
    kinds = (_look_up, _copy, _last, _sort, _add)
    return [kinds[int(rng.integers(len(kinds)))](rng) for _ in range(count)]


def _words(rng, least: int, most: int) -> list[str]:
    return rng.permutation(WORDS)[: rng.integers(least, most + 1)].tolist()


def _look_up(rng) -> tuple[str, str]:
    names = _words(rng, 3, 6)
    values = rng.integers(100, 1000, len(names)).tolist()
    chosen = int(rng.integers(len(names)))
    lines = "\n".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
    return f"Look up {names[chosen]}.\n{lines}", str(values[chosen])


def _copy(rng) -> tuple[str, str]:
    text = " ".join(_words(rng, 3, 8))
    return f"Copy: {text}", text


def _last(rng) -> tuple[str, str]:
    words = _words(rng, 3, 8)
    return f"Which is the last word? {' '.join(words)}", words[-1]


def _sort(rng) -> tuple[str, str]:
    words = _words(rng, 3, 5)
    return f"Sort: {' '.join(words)}", " ".join(sorted(words))


def _add(rng) -> tuple[str, str]:
    one, other = rng.integers(10, 100, 2).tolist()
    return f"Add {one} and {other}.", str(one + other)
