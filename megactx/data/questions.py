"""Short contexts with a question, for readers that have all of the context, nothing of it, or gists in its place.

    fact            four generated facts about people between sentences of prose; one of eight values is right
    niah_single_1   RULER's single needle between sentences of noise
    niah_single_2   the same between sentences of prose

Every context has exactly so many tokens, so that it is whole blocks: what comes last is a sentence that is cut.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from . import ruler
from .documents import VALIDATION
from .knowledge import Knowledge

ENTITIES, FACTS = 4, 4


@dataclass(frozen=True)
class Asked:
    """``ids`` of a context and the tokens of it that tell the answer; ``text`` and ``prefix`` stand before the answer.

    ``values`` are those to choose from; where it is one, nothing can be chosen, and it must be said.
    """

    task: str
    number: int
    context: str
    ids: list[int]
    needed: range
    text: str
    prefix: str
    values: tuple[str, ...]
    answer: str


def _fact(draw: random.Random, count: int, prose: Sequence[str]):
    knowledge = Knowledge(ENTITIES, draw, VALIDATION, changed=0)
    (question,) = knowledge.questions(1, draw)
    (needed,) = question.needed
    alike = [fact for fact in knowledge.facts if fact.what == needed.what and fact.name != needed.name]
    others = [fact for fact in knowledge.facts if fact.what != needed.what]
    told = [needed, draw.choice(alike), *draw.sample(others, FACTS - 2)]
    draw.shuffle(told)
    units, places = ruler.hidden(draw, prose[:count], [fact.sentence for fact in told])
    asked = {"question": question.text, "answer_prefix": question.prefix, "values": question.values}
    return units, [places[told.index(needed)]], [needed.value], asked


NOISE = "niah_single_1"
TASKS = {"fact": _fact, NOISE: ruler.niah_single_1, "niah_single_2": ruler.niah_single_2}


def asked(task: str, number: int, tokens: int, tokenizer, prose: Sequence[str], seed: int = 0) -> Asked:
    """The question of this number, behind a context of ``tokens`` tokens.

    Args:
        prose: sentences; each context begins at another one.

    Raises:
        ValueError: an unknown task, a context too short for what is told, or too little prose.
    """
    if task not in TASKS:
        raise ValueError(f"--tasks={task} is not known, allowed are {', '.join(TASKS)}")
    key = f"{task}/{tokens}/{seed}/{number}"
    at = random.Random(f"prose/{key}").randrange(len(prose)) if prose else 0
    prose = [*prose[at:], *prose[:at]]

    def built(count: int) -> tuple[str, dict, tuple[int, int], list[str]]:
        units, (place,), answers, said = TASKS[task](random.Random(key), count, prose)
        start = sum(len(unit) + 1 for unit in units[:place])
        return " ".join(units), said, (start, start + len(units[place])), answers

    def encoded(text: str):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)

    def below(count: int) -> bool:
        return len(encoded(built(count)[0])["input_ids"]) <= tokens

    most = tokens if task == NOISE else len(prose) - 2
    if not below(0):
        raise ValueError(f"--tokens={tokens} is not allowed: too short for what {task} tells")
    low, high = 0, 1
    while high < most and below(high):
        low, high = high, 2 * high
    high = min(high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if below(middle) else (low, middle)
    text, said, (start, end), (answer,) = built(low)
    more = [ruler.NOISE[n % len(ruler.NOISE)] for n in (low, low + 1)] if task == NOISE else prose[low : low + 2]
    found = encoded(" ".join([text, *more]))
    if len(found["input_ids"]) < tokens:
        raise ValueError(f"--tokens={tokens} is not allowed: {task} finds too little prose; give more by --path")
    offsets = found["offset_mapping"][:tokens]
    needed = [n for n, (a, b) in enumerate(offsets) if a < end and b > start]
    about = {"ids": found["input_ids"][:tokens], "context": " ".join([text, *more])[: offsets[-1][1]]}
    about |= {"text": said["question"], "prefix": said["answer_prefix"], "answer": answer}
    values = tuple(said.get("values", (answer,)))
    return Asked(task, number, needed=range(needed[0], needed[-1] + 1), values=values, **about)
