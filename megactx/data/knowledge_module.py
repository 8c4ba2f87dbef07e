"""DataModule of the stage ``core``: blocks of knowledge, a question behind them, and its answer (method 22).

BOS [ block 7 ][ block 2 ][ block 19 ] What is the metal of X? The metal of X is | tin          the window
BOS [ block 7 ]           [ block 19 ] What is the metal of X? The metal of X is | tin          dropped
"""

import random
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader

from megactx.framework.config.types import AtLeast2, Count, Share, Whole

from .documents import TRAIN, VALIDATION, tokenised, views
from .files import NARRATIVE
from .knowledge import Knowledge, asked_ids, blocks, encoded, sentences, tell, value_ids
from .resumable import Endless, Resumable
from .tokenizer import bos_id

ONCE, TWICE, TWO_HOPS = "told once", "told twice", "two hops"
PROSE = 20_000  # sentences of the texts, at most
TRIES = 20  # draws of a window until one has room for what is needed


@dataclass
class Case:
    """A question with its window, as ids. ``behind``: blocks that stand where the question cannot read them."""

    kind: str
    window: list[int]
    dropped: list[int]
    asked: list[int]
    values: list[list[int]]
    right: int
    behind: list[int]

    def row(self, window: list[int], tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """ids [T] and answers bool [T] of a window with question and answer; 0 behind, which nobody reads."""
        answer = self.values[self.right]
        before = [*window, *self.asked]
        ids, answers = np.zeros(tokens, dtype=np.int64), np.zeros(tokens, dtype=bool)
        text = [*before, *answer, *self.behind]
        ids[: len(text)], answers[len(before) : len(before) + len(answer)] = text, True
        return ids, answers


class Cases(Endless):
    """Case ``i`` is a function of (seed, i) alone. Each has people of its own, so nothing can be learned by heart.

    Blocks stand in a random order; those of one fact stay together, and an older version comes before a newer one.

    Args:
        prose: sentences between the facts.
        tokenizer: a Hugging Face tokenizer.
        block: K, tokens of a block.
        tokens: T of a row: as many blocks as fit, beside question and answer.
        entities: people that the facts of a window are drawn from.
        between: sentences of prose between two facts, on average.
        changed: share of attributes that are told twice.
        hops: share of questions of two hops.
        knowledge: whether the question can read the blocks; else they stand behind its answer.
        seed: of all draws.
        split: whose names people have.

    Raises:
        ValueError: a row has no room for what a question needs.
    """

    def __init__(self, prose, tokenizer, block, tokens, entities, between, changed, hops, knowledge, seed, split=TRAIN):
        self.prose, self.tokenizer, self.block, self.tokens = prose, tokenizer, block, tokens
        self.entities, self.between, self.changed, self.hops = entities, between, changed, hops
        self.knowledge, self.seed, self.split, self.bos = knowledge, seed, split, bos_id(tokenizer)

    def __getitem__(self, index: int) -> Case:
        draw = random.Random(f"{self.split}/{self.seed}/{index}")
        for _ in range(TRIES):
            if (case := self._case(draw)) is not None:
                return case
        raise ValueError(
            f"datamodule.tokens={self.tokens} is not allowed: too few for a question and the blocks that it needs"
        )

    def _case(self, draw: random.Random) -> Case | None:
        knowledge = Knowledge(self.entities, draw, self.split, self.changed)
        text, facts = tell(knowledge.facts, self.prose, self.between, draw)
        ids, spans = encoded(text, facts, self.tokenizer)
        hops = 2 if draw.random() < self.hops else 1
        question = knowledge.questions(1, draw, hops)[0]
        values = value_ids(self.tokenizer, question.values)
        asked = [token for part in asked_ids(self.tokenizer, question) for token in part]
        right, every = question.values.index(question.answer), range(-(-len(ids) // self.block))
        count = min(len(every), (self.tokens - 1 - len(asked) - max(map(len, values))) // self.block)
        needed = {n for fact in question.needed for n in blocks(spans[fact.key], self.block)}
        last = question.needed[-1]
        older = [spans[last.name, last.what, version] for version in range(last.version)]
        old = {n for span in older for n in blocks(span, self.block)}
        if len(needed) > count:
            return None
        marked = needed | old if len(needed | old) <= count else needed
        rest = [n for n in every if n not in needed | old]
        others = draw.sample(rest, min(len(rest), count - len(marked)))
        order = arranged(sorted(marked), others, draw)
        pieces = {n: ids[n * self.block : (n + 1) * self.block].tolist() for n in order}
        window = [token for n in order for token in pieces[n]]
        dropped = [token for n in order if n not in needed for token in pieces[n]]
        kind = TWO_HOPS if hops == 2 else TWICE if old and old <= marked else ONCE
        if not self.knowledge:
            return Case(kind, [self.bos], [self.bos], asked, values, right, behind=window)
        return Case(kind, [self.bos, *window], [self.bos, *dropped], asked, values, right, behind=[])


def arranged(marked: list[int], others: list[int], draw: random.Random) -> list[int]:
    """Numbers of blocks in a random order. Those of ``marked``, which ascend, keep theirs; neighbours stay together."""
    runs: list[list[int]] = []
    for n in marked:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    units = [True] * len(runs) + [False] * len(others)
    draw.shuffle(units)
    first, then = iter(runs), iter(others)
    return [n for mark in units for n in (next(first) if mark else [next(then)])]


class CaseBatches(Endless):
    """Batch ``i`` has the cases ``i * B`` to ``i * B + B - 1``.

    Each item is a dict of ``ids`` int64 and ``answers`` bool [B, T]; and, where questions read blocks, ``dropped`` and
    ``dropped_answers``, the same without the needed blocks.
    """

    def __init__(self, cases: Cases, batch: int):
        self.cases, self.batch = cases, batch

    def __getitem__(self, index: int) -> dict:
        cases = [self.cases[n] for n in range(index * self.batch, (index + 1) * self.batch)]
        ids, answers = self._rows([(case, case.window) for case in cases])
        if not self.cases.knowledge:
            return {"ids": ids, "answers": answers}
        dropped, those = self._rows([(case, case.dropped) for case in cases])
        return {"ids": ids, "answers": answers, "dropped": dropped, "dropped_answers": those}

    def _rows(self, windows: list[tuple[Case, list[int]]]) -> tuple[np.ndarray, np.ndarray]:
        ids, answers = zip(*(case.row(window, self.cases.tokens) for case, window in windows), strict=True)
        return np.stack(ids), np.stack(answers)


class KnowledgeData(Resumable):
    """Training batches and held-out questions of a core, resumed to the exact batch.

    Args:
        source: of the prose between the facts, training texts for training, held-out ones for questions.
        tokenizer: a Hugging Face tokenizer.
        block, tokens, entities, between, changed, hops, knowledge, seed: see ``Cases``.
        batch: B, questions.
        validation_questions: held-out ones, per validation.
        workers: processes that build batches.
    """

    def __init__(
        self,
        source,
        tokenizer,
        block: AtLeast2,
        tokens: AtLeast2,
        entities: AtLeast2,
        between: Whole,
        changed: Share,
        hops: Share,
        knowledge: bool,
        batch: Count,
        validation_questions: Count = 64,
        seed: Whole = 0,
        workers: Whole = 0,
    ):
        super().__init__()
        self.source, self.tokenizer, self.batch, self.seed, self.workers = source, tokenizer, batch, seed, workers
        self.row, self.questions = tokens, validation_questions
        self.settings = dict(block=block, tokens=tokens, entities=entities, between=between, changed=changed, hops=hops)
        self.settings |= dict(knowledge=knowledge, seed=seed)

    def limit_to(self, positions: int) -> None:
        """Rows are no longer than a base LM takes.

        Raises:
            ValueError: they are.
        """
        if self.row > positions:
            raise ValueError(f"datamodule.tokens={self.row} is not allowed: the base LM takes {positions} at most")

    def setup(self, stage=None) -> None:
        if not hasattr(self, "training"):
            rows = tokenised(self.source, self.tokenizer)
            cases = {
                split: Cases(prose(rows, self.tokenizer, split), self.tokenizer, **self.settings, split=split)
                for split in (TRAIN, VALIDATION)
            }
            self.training, self.validation = CaseBatches(cases[TRAIN], self.batch), cases[VALIDATION]
            self.validation[0]  # what does not fit is said before the training

    def tokens(self, steps: int) -> int:
        """Tokens served in the first ``steps`` steps, each window once, padding too."""
        return steps * self.each * self.batch * self.row

    def train_dataloader(self):
        return self.loader(self.training, sampler=self.indices(), num_workers=self.workers)

    def val_dataloader(self):
        mine = self.share(self.questions, f"datamodule.validation_questions={self.questions}")
        return DataLoader(self.validation, batch_size=None, sampler=mine)


def prose(rows, tokenizer, split: str) -> list[str]:
    """Sentences of the texts on one side of the split, prose first; a side without any has those of all texts.

    Raises:
        ValueError: there are none.
    """
    sides, domains = (rows.data.column(name).to_pylist() for name in ("split", "domain"))
    texts = views(rows)
    order = sorted(range(len(texts)), key=lambda n: (sides[n] != split, domains[n] != NARRATIVE))
    found: list[str] = []
    for n in order:
        if len(found) >= PROSE or (found and sides[n] != split):
            return found[:PROSE]
        found += sentences([tokenizer.decode(texts[n])])
    if not found:
        raise ValueError("data: there is no sentence of prose in the texts; give others")
    return found
