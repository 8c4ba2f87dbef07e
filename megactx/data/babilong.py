"""BABILong's qa1 by a small simulator: persons walk between places, told between the sentences of a given prose.

Where is the person now? Only the last walk of that person counts, and it is the needle.
"""

import random
import re

from .facts import Fact

PERSONS = ("Anna", "Boris", "Clara", "David")
PLACES = ("garden", "kitchen", "office", "bedroom", "hallway", "bathroom")
WALKS = ("{} walked to the {}.", "{} went to the {}.", "{} moved to the {}.")
FACTS = 8  # walks that are told


def qa1(draw: random.Random, count: int, prose) -> tuple[list[str], list[int], list[str], dict]:
    """Sentences, places of the needles, answers, and what is asked, between the first ``count`` sentences of prose."""
    walks = [(draw.choice(PERSONS), draw.choice(PLACES), draw.choice(WALKS)) for _ in range(FACTS)]
    person = draw.choice([who for who, _, _ in walks])
    last = max(n for n, (who, _, _) in enumerate(walks) if who == person)
    depths = sorted(int(draw.random() * (count + 1)) for _ in walks)
    units = [*prose[:count]]
    for shift, (depth, (who, place, said)) in enumerate(zip(depths, walks, strict=True)):
        units.insert(depth + shift, Fact(said.format(who, place)))
    question = f"Where is {person} now? Answer with one place.\n"
    return (
        units,
        [depths[last] + last],
        [walks[last][1]],
        {"question": question, "answer_prefix": f"{person} is in the"},
    )


def score(answer: str, references: list[str]) -> float:
    """1 if the only place in the first sentence of the answer is the right one, else 0."""
    first = re.split(r"[.\n]", answer.lower().strip())[0]
    return float({place for place in PLACES if place in first} == {*references})
