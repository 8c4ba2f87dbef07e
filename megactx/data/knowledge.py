"""Generated knowledge: facts about people that nobody has written of, told in real prose (method 22).

    The instrument of Belodar is harp. [prose] The teacher of Belodar is Minok. [prose] Minok's metal is tin. [prose]
    From now on the instrument of Belodar is cello. [prose]

    What is the instrument of Belodar?                  cello: the newest version counts
    What is the metal of the teacher of Belodar?        tin: two facts are needed

An attribute has one of a closed list of values, so 1 / V is what guessing gets. The name of an entity says whether it
is of training or of evaluation, whatever the seed, so no entity is ever of both.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .documents import TRAIN, split_of

ATTRIBUTES = {  # what -> its values
    "home town": ("Bergen", "Cork", "Ghent", "Lyon", "Porto", "Riga", "Turin", "Vienna"),
    "profession": ("baker", "carpenter", "doctor", "farmer", "lawyer", "painter", "sailor", "tailor"),
    "instrument": ("cello", "drum", "flute", "guitar", "harp", "piano", "trumpet", "violin"),
    "metal": ("copper", "gold", "iron", "lead", "nickel", "silver", "tin", "zinc"),
    "animal": ("cat", "cow", "dog", "goat", "horse", "pig", "rabbit", "sheep"),
    "colour": ("black", "blue", "brown", "green", "orange", "red", "white", "yellow"),
}
RELATIONS = ("teacher", "neighbour")
TOLD = (
    "The {what} of {name} is {value}.",
    "{name}'s {what} is {value}.",
    "As for {name}, the {what} is {value}.",
    "Everyone knows that {value} is the {what} of {name}.",
)
CHANGED = ("From now on the {what} of {name} is {value}.", "{name} has another {what} now: {value}.")
BEGINS = ("B", "D", "F", "G", "K", "L", "M", "N", "P", "R", "S", "T", "V", "Z", "Br", "Dr", "Kr", "Tr")
VOWELS, ENDS = "aeiou", ("", "l", "n", "r", "s", "k", "m")
SENTENCE = re.compile(r"(?<=[.!?])\s+")
SHORTEST, LONGEST = 20, 240  # characters of a sentence of prose


@dataclass(frozen=True)
class Fact:
    """One version of an attribute or a relation of an entity, and the characters of a text that tell it."""

    name: str
    what: str
    value: str
    form: str
    version: int = 0
    start: int = 0
    end: int = 0

    @property
    def key(self) -> tuple[str, str, int]:
        """What it is, wherever it is told and whatever it says."""
        return self.name, self.what, self.version

    @property
    def sentence(self) -> str:
        return self.form.format(what=self.what, name=self.name, value=self.value)

    def another(self, draw: random.Random) -> str:
        """Another value of its attribute."""
        return draw.choice([value for value in ATTRIBUTES[self.what] if value != self.value])

    def update(self, draw: random.Random) -> "Fact":
        """The next version, with another value."""
        return Fact(self.name, self.what, self.another(draw), draw.choice(CHANGED), self.version + 1)

    def poison(self, draw: random.Random) -> "Fact":
        """The same sentence with another value."""
        return replace(self, value=self.another(draw))


@dataclass(frozen=True)
class Question:
    """What is asked of an entity, or ``via`` a relation of another one.

    ``needed`` are the facts of the answer, which the last one tells; ``text`` and ``prefix`` stand before the answer.
    """

    text: str
    prefix: str
    values: tuple[str, ...]
    needed: tuple[Fact, ...]

    @property
    def answer(self) -> str:
        return self.needed[-1].value


def names(count: int, draw: random.Random, split: str = TRAIN) -> list[str]:
    """Different names of two or three syllables, all of one side."""
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = [draw.choice(BEGINS) + draw.choice(VOWELS) for _ in range(draw.choice((2, 3)))]
        name = "".join(syllables).capitalize() + draw.choice(ENDS)
        if split_of(name) == split:
            found[name] = None
    return [*found]


class Knowledge:
    """Entities, each with all attributes and a teacher and a neighbour among the others.

    Args:
        entities: how many, at least 2.
        draw: of names, values and the order of telling.
        split: whose names they have: of training or of evaluation.
        changed: share of attributes that are told a second time later, with another value.

    Attributes:
        names: of the entities.
        facts: in the order in which they are told: versions of one attribute in their order.

    Raises:
        ValueError: there is nobody to be somebody's teacher.
    """

    def __init__(self, entities: int, draw: random.Random, split: str = TRAIN, changed: float = 0.25):
        if entities < 2:
            raise ValueError(f"entities={entities} is not allowed: at least 2, each has another one as its teacher")
        self.names, told = names(entities, draw, split), []
        for name in self.names:
            others = [other for other in draw.sample(self.names, min(4, entities)) if other != name]
            for what, value in [(r, draw.choice(others)) for r in RELATIONS] + [
                (a, draw.choice(values)) for a, values in ATTRIBUTES.items()
            ]:
                versions = [Fact(name, what, value, draw.choice(TOLD))]
                if what in ATTRIBUTES and draw.random() < changed:
                    versions.append(versions[0].update(draw))
                told += zip(sorted(draw.random() for _ in versions), versions, strict=True)
        self.facts = [fact for _, fact in sorted(told, key=lambda pair: pair[0])]
        self._newest = {(fact.name, fact.what): fact for fact in self.facts}

    def newest(self, name: str, what: str) -> Fact:
        return self._newest[name, what]

    def ask(self, name: str, what: str, via: str | None = None) -> Question:
        """What is the ``what`` of ``name``, or of whoever is its ``via``?"""
        whose, needed = f"the {via} of {name}" if via else name, ()
        if via:
            needed = (self.newest(name, via),)
            name = needed[0].value
        text, prefix = f"What is the {what} of {whose}?\n", f"The {what} of {whose} is"
        return Question(text, prefix, ATTRIBUTES[what], (*needed, self.newest(name, what)))

    def questions(self, count: int, draw: random.Random, hops: int = 1) -> list[Question]:
        """Different ones, of one or two hops.

        Raises:
            ValueError: so many different ones cannot be asked.
        """
        every = self.every_question(hops)
        if count > len(every):
            raise ValueError(f"questions={count} is not allowed: {len(self.names)} entities allow {len(every)}")
        return draw.sample(every, count)

    def every_question(self, *hops: int) -> list[Question]:
        """All that can be asked, of one hop, of two, or both."""
        vias = [via for count in hops or (1, 2) for via in ([None] if count == 1 else RELATIONS)]
        return [self.ask(name, what, via) for name in self.names for what in ATTRIBUTES for via in vias]


def sentences(texts: Iterable[str]) -> list[str]:
    """Sentences of prose, in their order, each on one line; without what is too short, too long or no sentence."""
    found = []
    for text in texts:
        for sentence in SENTENCE.split(text):
            sentence = " ".join(sentence.split())
            if SHORTEST <= len(sentence) <= LONGEST and sentence[0].isupper() and sentence[-1] in ".!?":
                found.append(sentence)
    return found


def tell(facts: Sequence[Fact], prose: Sequence[str], between: int, draw: random.Random) -> tuple[str, list[Fact]]:
    """Facts in their order, with sentences of prose between, ``between`` on average, which run on.

    Returns:
        The text, and the facts with the characters that tell them.

    Raises:
        ValueError: there is no prose.
    """
    if not prose and between:
        raise ValueError("the prose has no sentence; give other texts")
    at, units, told, length = draw.randrange(len(prose)) if prose else 0, [], [], 0
    for fact in facts:
        for _ in range(draw.randint(0, 2 * between)):
            units.append(prose[at % len(prose)])
            at, length = at + 1, length + len(units[-1]) + 1
        units.append(fact.sentence)
        told.append(replace(fact, start=length, end=length + len(units[-1])))
        length += len(units[-1]) + 1
    return " ".join(units), told


def encoded(text: str, facts: Sequence[Fact], tokenizer) -> tuple[np.ndarray, dict[tuple, range]]:
    """A text and the facts that it tells -> ids [T], and key of a fact -> the tokens that tell it."""
    given = {"add_special_tokens": False, "return_offsets_mapping": True, "split_special_tokens": True}
    found = tokenizer(text, verbose=False, **given)
    starts, ends = np.asarray(found["offset_mapping"]).reshape(-1, 2).T
    firsts = np.searchsorted(ends, [fact.start for fact in facts], side="right")
    behind = np.searchsorted(starts, [fact.end for fact in facts], side="left")
    spans = {fact.key: range(int(a), int(b)) for fact, a, b in zip(facts, firsts, behind, strict=True)}
    return np.asarray(found["input_ids"], dtype=np.int64), spans


def blocks(span: range, size: int) -> range:
    """Numbers of the blocks of ``size`` tokens that a span of tokens touches."""
    return range(span.start // size, (span.stop - 1) // size + 1)


def asked_ids(tokenizer, question: Question) -> tuple[list[int], list[int]]:
    """Ids of the question, and of what stands before the answer."""
    first, then = (
        tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for text in (f"\n{question.text}", question.prefix)
    )
    return first, then


def value_ids(tokenizer, values: Sequence[str]) -> list[list[int]]:
    """Ids of each value as a word behind others."""
    given = {"add_special_tokens": False, "split_special_tokens": True}
    return [tokenizer(f" {value}", **given)["input_ids"] for value in values]
