"""BABILong's qa1 by a small simulator: persons walk between places, told between the sentences of a given prose.

Where is the person now? Only the last walk of that person counts, and it is the needle.
"""

import random
import re

PERSONS = ("Anna", "Boris", "Clara", "David")
PLACES = ("garden", "kitchen", "office", "bedroom", "hallway", "bathroom")
WALKS = ("{} walked to the {}.", "{} went to the {}.", "{} moved to the {}.")
FACTS, ROOM = 8, 20  # walks that are told; tokens to write


def case(length: int, tokenizer, seed: int, prose: list[str]) -> dict:
    """A row with kvpress's columns, as long as ``length`` tokens and the prose allow.

    Raises:
        ValueError: the length holds no case, or the prose is too short for it.
    """

    def built(count: int) -> tuple[dict, int]:
        draw = random.Random(f"qa1/{length}/{seed}")
        walks = [(draw.choice(PERSONS), draw.choice(PLACES), draw.choice(WALKS)) for _ in range(FACTS)]
        person = draw.choice([who for who, _, _ in walks])
        last = max(n for n, (who, _, _) in enumerate(walks) if who == person)
        depths = sorted(int(draw.random() * (count + 1)) for _ in walks)
        units = [*prose[:count]]
        for shift, (depth, (who, place, said)) in enumerate(zip(depths, walks, strict=True)):
            units.insert(depth + shift, said.format(who, place))
        at = depths[last] + last
        start = len(" ".join(units[:at])) + (at > 0)
        row = {"context": " ".join(units), "question": f"Where is {person} now? Answer with one place.\n"}
        row |= {"answer_prefix": f"{person} is in the", "answer": [walks[last][1]], "max_new_tokens": ROOM}
        row |= {"task": "qa1", "length": length, "needles": [[start, start + len(units[at])]]}
        text = f"{row['context']}\n{row['question']}{row['answer_prefix']}"
        return row, len(tokenizer(text, add_special_tokens=False)["input_ids"]) + ROOM

    if built(0)[1] > length:
        raise ValueError(f"--lengths={length} is not allowed: too short for qa1")
    low, high = 0, len(prose)
    if built(high)[1] < length * 0.9:
        raise ValueError(f"--path: the prose has {high} sentences, too few for --lengths={length}; give more")
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if built(middle)[1] <= length else (low, middle - 1)
    return built(low)[0]


def score(answer: str, references: list[str]) -> float:
    """1 if the only place in the first sentence of the answer is the right one, else 0."""
    first = re.split(r"[.\n]", answer.lower().strip())[0]
    return float({place for place in PLACES if place in first} == {*references})
