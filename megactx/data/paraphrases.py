"""Needles whose question shares no rare word with them: told in other words, or told again in other words.

    told     The secret number of the physician is 4821973.           beside it the numbers of others
    asked    What is the secret number of the doctor?

Words that needle and question share stand in every needle, so they say nothing. Half of the pairs of words are for
training keys, the others for measuring alone.
"""

import random

from .facts import Fact

PAIRS = (  # (told, asked), either way round
    ("physician", "doctor"),
    ("attorney", "lawyer"),
    ("automobile", "car"),
    ("infant", "baby"),
    ("dwelling", "house"),
    ("vessel", "ship"),
    ("instructor", "teacher"),
    ("monarch", "king"),
    ("garment", "clothes"),
    ("beverage", "drink"),
    ("forest", "woods"),
    ("merchant", "trader"),
    ("soldier", "warrior"),
    ("author", "writer"),
    ("film", "movie"),
    ("ocean", "sea"),
    ("stone", "rock"),
    ("physicist", "scientist"),
    ("pupil", "student"),
    ("street", "road"),
    ("aircraft", "plane"),
    ("medicine", "drug"),
    ("farmer", "peasant"),
    ("robber", "thief"),
    ("couch", "sofa"),
    ("chef", "cook"),
    ("photograph", "picture"),
    ("rabbit", "bunny"),
    ("priest", "clergyman"),
    ("shop", "store"),
    ("cottage", "cabin"),
    ("sailor", "mariner"),
    ("hill", "mountain"),
    ("gift", "present"),
    ("hound", "dog"),
    ("kitten", "cat"),
    ("bicycle", "bike"),
    ("cemetery", "graveyard"),
    ("jail", "prison"),
    ("nation", "country"),
    ("companion", "friend"),
    ("parent", "mother"),
    ("policeman", "officer"),
    ("painter", "artist"),
    ("coin", "money"),
    ("dinner", "supper"),
    ("airport", "airfield"),
    ("labourer", "worker"),
)
LEARNED, MEASURED = PAIRS[::2], PAIRS[1::2]
TOLD = "The secret number of the {} is {}."
CHANGED = "From now on the secret number of the {} is {}."
DECOYS = len(MEASURED) - 1  # needles about others: more than a window of 1,024 tokens holds with their neighbours


def _numbers(draw: random.Random, count: int) -> list[str]:
    return [str(number) for number in draw.sample(range(10**6, 10**7), count)]


def asked(word: str) -> dict:
    """Question and answer prefix."""
    return {
        "question": f"What is the secret number of the {word} mentioned in the text above?\n",
        "answer_prefix": f"The secret number of the {word} mentioned in the text above is",
    }


def niah_paraphrase(draw: random.Random, count: int, prose) -> tuple[list[str], list[int], list[str], dict]:
    """Sentences, place of the needle, its answer, and what is asked, between the first ``count`` sentences of prose."""
    told = [draw.sample(pair, 2) for pair in draw.sample(MEASURED, 1 + DECOYS)]
    values = _numbers(draw, len(told))
    facts = [TOLD.format(word, value) for (word, _), value in zip(told, values, strict=True)]
    units, places = scattered(draw, prose[:count], facts)
    return units, places[:1], values[:1], asked(told[0][1])


def niah_changed(draw: random.Random, count: int, prose) -> tuple[list[str], list[int], list[str], dict]:
    """The same; what is asked for was told in the question's word first, and later in another one, with a new value."""
    told = [draw.sample(pair, 2) for pair in draw.sample(MEASURED, 1 + DECOYS)]
    values = _numbers(draw, 1 + len(told))
    facts = [CHANGED.format(told[0][0], values[0])]
    facts += [TOLD.format(word, value) for (word, _), value in zip(told[1:], values[1:], strict=False)]
    facts.append(TOLD.format(told[0][1], values[-1]))
    units, places = scattered(draw, prose[:count], facts)
    if places[-1] > places[0]:  # the old value comes first
        first, last = places[0], places[-1]
        units[first], units[last] = units[last], units[first]
        places[0] = last
    return units, places[:1], values[:1], asked(told[0][1])


def scattered(draw: random.Random, filler, facts: list[str]) -> tuple[list[str], list[int]]:
    """Facts between sentences, each anywhere -> all sentences, places of the facts in their order."""
    depths = sorted((int(draw.random() * (len(filler) + 1)), n) for n in range(len(facts)))
    units, places = list(filler), [0] * len(facts)
    for shift, (depth, n) in enumerate(depths):
        units.insert(depth + shift, Fact(facts[n]))
        places[n] = depth + shift
    return units, places
