"""Short contexts with a question, for readers that have all of the context, nothing of it, or gists in its place.

    fact            generated facts about people between sentences of prose, four at most and one for each 32 tokens;
                    one of eight values is right
    niah_single_1   RULER's single needle between sentences of noise
    niah_single_2   the same between sentences of prose

Every context has exactly so many tokens, so that it is whole blocks: what comes last is a sentence that is cut.

    [begin][ context ................ ][ question ... answer ]     begin and question as ``around`` gives them
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import ruler
from .documents import TRAIN, VALIDATION
from .knowledge import Knowledge, asked_ids, value_ids
from .tokenizer import bos_id

ENTITIES, FACTS, EACH = 4, 4, 32  # at most so many facts, one for each so many tokens
TOKENS = "loss.questions.tokens"


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


def _fact(draw: random.Random, count: int, prose: Sequence[str], split: str, tokens: int):
    knowledge = Knowledge(ENTITIES, draw, split, changed=0)
    (question,) = knowledge.questions(1, draw)
    (needed,) = question.needed
    alike = [fact for fact in knowledge.facts if fact.what == needed.what and fact.name != needed.name]
    others = [fact for fact in knowledge.facts if fact.what != needed.what]
    told = [needed, draw.choice(alike), *draw.sample(others, FACTS - 2)][: max(1, tokens // EACH)]
    draw.shuffle(told)
    units, places = ruler.hidden(draw, prose[:count], [fact.sentence for fact in told])
    asked = {"question": question.text, "answer_prefix": question.prefix, "values": question.values}
    return units, [places[told.index(needed)]], [needed.value], asked


def _of_ruler(task):
    return lambda draw, count, prose, split, tokens: task(draw, count, prose)  # keys and numbers have no side


NOISE = "niah_single_1"
TASKS = {"fact": _fact, NOISE: _of_ruler(ruler.niah_single_1), "niah_single_2": _of_ruler(ruler.niah_single_2)}


def check_tasks(setting: str, tasks: Sequence[str]) -> None:
    """Raises: ValueError: an unknown task; names the setting."""
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"{setting}={task} is not known, allowed are {', '.join(TASKS)}")


def asked(
    task: str,
    number: int,
    tokens: int,
    tokenizer,
    prose: Sequence[str],
    seed: int = 0,
    split: str = VALIDATION,
    setting: str = "--tokens",
) -> Asked:
    """The question of this number, behind a context of ``tokens`` tokens.

    Args:
        prose: sentences; each context begins at another one.
        split: whose names people have; the questions of training are others, too.
        setting: where a user says ``tokens``.

    Raises:
        ValueError: a context too short for what is told, or too little prose.
    """
    key = f"{task}/{tokens}/{seed}/{number}" + f"/{split}" * (split != VALIDATION)
    at = random.Random(f"prose/{key}").randrange(len(prose)) if prose else 0
    prose = [*prose[at:], *prose[:at]]

    def built(count: int) -> tuple[str, dict, tuple[int, int], list[str]]:
        units, (place,), answers, said = TASKS[task](random.Random(key), count, prose, split, tokens)
        start = sum(len(unit) + 1 for unit in units[:place])
        return " ".join(units), said, (start, start + len(units[place])), answers

    def encoded(text: str):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)

    def below(count: int) -> bool:
        return len(encoded(built(count)[0])["input_ids"]) <= tokens

    most = tokens if task == NOISE else len(prose) - 2
    if not below(0):
        raise ValueError(f"{setting}={tokens} is not allowed: too short for what {task} tells")
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
        raise ValueError(f"{setting}={tokens} is not allowed: {task} finds too little prose; give more texts")
    offsets = found["offset_mapping"][:tokens]
    needed = [n for n, (a, b) in enumerate(offsets) if a < end and b > start]
    about = {"ids": found["input_ids"][:tokens], "context": " ".join([text, *more])[: offsets[-1][1]]}
    about |= {"text": said["question"], "prefix": said["answer_prefix"], "answer": answer}
    values = tuple(said.get("values", (answer,)))
    return Asked(task, number, needed=range(needed[0], needed[-1] + 1), values=values, **about)


def frame(tokenizer, plain: bool) -> tuple[str, str]:
    """What stands before the context and between question and answer prefix."""
    if plain or not tokenizer.chat_template:
        return "", ""
    mark = "CONTEXT"
    said = [{"role": "user", "content": mark}]
    before, _, behind = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True).partition(mark)
    return before, behind


def around(tokenizer, plain: bool) -> tuple[list[int], list[int]]:
    """``frame`` as ids; without a template the token that opens a document stands before the context."""
    before, behind = (
        tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        for text in frame(tokenizer, plain)
    )
    return before or [bos_id(tokenizer)], behind


class QuestionBatches:
    """Batch ``i`` of questions behind contexts: a function of (seed, i) alone.

    Args:
        prose: sentences of the texts of that side.
        tokenizer: a Hugging Face tokenizer.
        block: K.
        count: Q, questions of a batch.
        tokens: T of a context, multiples of K; one for all of a batch, each with every task in turn.
        tasks: of ``TASKS``, one for all of a batch, in turn: its questions are then about equally long.
        framed: share of the batches in which the chat template stands around context and question; 0 where the
            tokenizer has none.
        seed: of all draws.
        split: whose names people have, of training or of evaluation.

    Each batch is a dict of ``contexts`` int64 [Q, F + T], F tokens before the context; ``context_starts`` int64 [Q, N]
    of its blocks; ``questions`` int64 [Q, R], question and answer, padded with 0; and ``answers`` int64 [Q, A], places
    of the answer in it, padded with -1.

    Raises:
        ValueError: an unknown task, a context that is no whole blocks, too short for what is told, or too little prose.
    """

    def __init__(self, prose, tokenizer, block: int, count: int, tokens, tasks, framed: float, seed: int, split=TRAIN):
        check_tasks("loss.questions.tasks", tasks)
        for length in tokens:
            if length % block:
                raise ValueError(f"{TOKENS}={length} is not allowed: a multiple of block_size={block}")
        self.prose, self.tokenizer, self.block, self.count = prose, tokenizer, block, count
        self.tokens, self.tasks, self.framed, self.seed, self.split = list(tokens), list(tasks), framed, seed, split
        first = [self[index] for index in range(self.kinds)]  # what does not fit is said before the training
        self.longest = max(batch["contexts"].shape[1] + batch["questions"].shape[1] for batch in first)

    @property
    def kinds(self) -> int:
        """Batches until each task was asked behind contexts of each length."""
        return len(self.tasks) * len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        plain = random.Random(f"framed/{self.seed}/{index}").random() >= self.framed
        first, behind = around(self.tokenizer, plain)
        task = self.tasks[index % len(self.tasks)]
        tokens = self.tokens[index // len(self.tasks) % len(self.tokens)]
        contexts, rows, places = [], [], []
        for number in range(index * self.count, (index + 1) * self.count):
            case = asked(task, number, tokens, self.tokenizer, self.prose, self.seed, self.split, TOKENS)
            question, prefix = asked_ids(self.tokenizer, case)
            (answer,) = value_ids(self.tokenizer, [case.answer])
            before = [*question, *behind, *prefix]
            contexts.append([*first, *case.ids])
            rows.append([*before, *answer])
            places.append([*range(len(before), len(before) + len(answer))])
        starts = len(first) + np.arange(0, tokens, self.block)
        return {
            "contexts": np.asarray(contexts),
            "context_starts": np.tile(starts, (self.count, 1)),
            "questions": _padded(rows, 0),
            "answers": _padded(places, -1),
        }


def _padded(rows: list[list[int]], value: int) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for own, row in zip(out, rows, strict=True):
        own[: len(row)] = row
    return out
