"""DataModule of the stage ``core``: blocks of knowledge, a question behind them, and its answer (method 22).

BOS [ block 7 ][ block 2 ][ block 19 ]  ->  What is the metal of X? The metal of X is | tin      the window
                                        ->  What is the colour of Y? ...                | blue     more that it answers
BOS [ block 7 ]           [ block 19 ]  ->  What is the metal of X? The metal of X is | tin      dropped

Behind the blocks a window may have text of a session, as a working context of a tree and a session has.

A window is read once, whatever many questions stand behind it; none of them sees another.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from megactx.framework.config.types import AtLeast2, Count, Share, Whole

from .documents import TRAIN, VALIDATION, Views, tokenised
from .files import NARRATIVE
from .knowledge import Knowledge, Question, asked_ids, blocks, encoded, sentences, tell, value_ids
from .resumable import Endless, Resumable
from .tokenizer import bos_id

ONCE, TWICE, TWO_HOPS = "told once", "told twice", "two hops"
PROSE = 20_000  # sentences of the texts, at most
TRIES = 20  # draws of a window until one has room for what is needed


Pair = tuple[list[int], list[int]]  # a question with what stands before its answer, and the answer, as ids


@dataclass
class Case:
    """A question with its window, as ids. ``more``: other questions that the window answers, with their answers."""

    kind: str
    window: list[int]
    dropped: list[int]
    asked: list[int]
    values: list[list[int]]
    right: int
    more: list[Pair]

    @property
    def pair(self) -> Pair:
        return self.asked, self.values[self.right]


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
        alike: share of the other blocks that are like the question, as far as there are such: they tell the same
            attribute of somebody, or something else with the same name, as what a search finds besides.
        questions: of a window, at most: the drawn one, and others whose facts stand in the window whole.
        session: tokens of running prose between the blocks and the questions, at most; how many is drawn.
        seed: of all draws.
        split: whose names people have.

    Raises:
        ValueError: a row has no room for what a question needs, or the session takes more than half of it.
    """

    def __init__(
        self,
        prose,
        tokenizer,
        block,
        tokens,
        entities,
        between,
        changed,
        hops,
        alike,
        questions,
        session,
        seed,
        split=TRAIN,
    ):
        self.prose, self.tokenizer, self.block, self.tokens = prose, tokenizer, block, tokens
        self.entities, self.between, self.changed, self.hops, self.alike = entities, between, changed, hops, alike
        self.questions, self.session, self.seed, self.split = questions, session, seed, split
        self.bos = bos_id(tokenizer)
        if session > tokens // 2:
            raise ValueError(f"datamodule.session={session} is not allowed: at most half of datamodule.tokens={tokens}")

    def __getitem__(self, index: int) -> Case:
        draw = random.Random(f"{self.split}/{self.seed}/{index}")
        least = []
        for _ in range(TRIES):
            case = self._case(draw)
            if isinstance(case, Case):
                return case
            least.append(case)
        raise ValueError(
            f"datamodule.tokens={self.tokens} is not allowed: too few for a question and the blocks that it needs,"
            f" {min(least)} or more"
        )

    def _case(self, draw: random.Random) -> Case | int:
        """A case; or how many tokens it would have taken, where there is no room for it."""
        knowledge = Knowledge(self.entities, draw, self.split, self.changed)
        text, facts = tell(knowledge.facts, self.prose, self.between, draw)
        ids, spans = encoded(text, facts, self.tokenizer)
        hops = 2 if draw.random() < self.hops else 1
        question = knowledge.questions(1, draw, hops)[0]
        values = value_ids(self.tokenizer, question.values)
        asked = self._asked(question)
        right, every = question.values.index(question.answer), range(-(-len(ids) // self.block))
        session = self._session(draw) if self.session else []
        beside = 1 + len(session) + len(asked) + max(map(len, values))
        count = min(len(every), (self.tokens - beside) // self.block)
        needed = self._told(question, spans)
        old = self._older(question, spans)
        if len(needed) > count:
            return beside + len(needed) * self.block
        marked = needed | old if len(needed | old) <= count else needed
        rest = [n for n in every if n not in needed | old]
        near = self._alike(question, knowledge, spans)
        others = chosen(rest, near, min(len(rest), count - len(marked)), self.alike, draw)
        order = arranged(sorted(marked), others, draw)
        pieces = {n: ids[n * self.block : (n + 1) * self.block].tolist() for n in order}
        window = [token for n in order for token in pieces[n]]
        dropped = [token for n in order if n not in needed for token in pieces[n]]
        kind = TWO_HOPS if hops == 2 else TWICE if old and old <= marked else ONCE
        read, without = ([self.bos, *blocks_of, *session] for blocks_of in (window, dropped))
        case = Case(kind, read, without, asked, values, right, more=[])
        if self.questions > 1:
            also = [one for one in knowledge.every_question() if one != question and self._stands(one, spans, order)]
            pairs = [(self._asked(one), value_ids(self.tokenizer, [one.answer])[0]) for one in also]
            fits = [pair for pair in pairs if len(case.window) + sum(map(len, pair)) <= self.tokens]
            case.more = draw.sample(fits, min(len(fits), self.questions - 1))
        return case

    def _session(self, draw: random.Random) -> list[int]:
        """Sentences that follow each other in the texts, the last of so many tokens."""
        count, found = draw.randint(0, self.session), []
        first = draw.randrange(len(self.prose))
        for n in range(first, first + len(self.prose)):
            if len(found) >= count:
                break
            sentence = f" {self.prose[n % len(self.prose)]}"
            found += self.tokenizer(sentence, add_special_tokens=False)["input_ids"]
        return found[len(found) - count :]

    def _asked(self, question: Question) -> list[int]:
        return [token for part in asked_ids(self.tokenizer, question) for token in part]

    def _told(self, question: Question, spans: dict) -> set[int]:
        """Blocks that tell the facts of an answer."""
        return {n for fact in question.needed for n in blocks(spans[fact.key], self.block)}

    def _older(self, question: Question, spans: dict) -> set[int]:
        """Blocks that tell what the answer was before."""
        last = question.needed[-1]
        older = [spans[last.name, last.what, version] for version in range(last.version)]
        return {n for span in older for n in blocks(span, self.block)}

    def _alike(self, question: Question, knowledge: Knowledge, spans: dict) -> set[int]:
        """Blocks that tell the attribute that is asked for, or name somebody whom the answer needs."""
        names, what = {fact.name for fact in question.needed}, question.needed[-1].what
        like = [fact for fact in knowledge.facts if fact.what == what or {fact.name, fact.value} & names]
        return {n for fact in like for n in blocks(spans[fact.key], self.block)}

    def _stands(self, question: Question, spans: dict, order: list[int]) -> bool:
        """Each fact of the answer stands in these blocks in one piece, and nothing that was true before it."""
        pieces = [[*blocks(spans[fact.key], self.block)] for fact in question.needed]
        together = {*zip(order, order[1:], strict=False)}
        whole = all(n in order for piece in pieces for n in piece) and all(
            pair in together for piece in pieces for pair in zip(piece, piece[1:], strict=False)
        )
        return whole and not self._older(question, spans) & {*order}


def chosen(rest: list[int], near: set[int], count: int, share: float, draw: random.Random) -> list[int]:
    """``count`` of ``rest``, of which ``share`` are of ``near``, as far as there are as many."""
    like = draw.sample(sorted(near & {*rest}), min(round(share * count), len(near & {*rest})))
    return [*like, *draw.sample([n for n in rest if n not in like], count - len(like))]


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
    """Batch ``i`` has the cases ``i * B`` to ``i * B + B - 1``: B windows of at most T tokens, Q questions of R tokens.

    Each item is a dict of ``window`` int64 [B, T] with ``lengths`` [B]; ``asked`` int64 and ``answers`` bool [B, Q, R],
    the drawn question first, no answer where a window has fewer questions; and ``dropped`` [B, T] with
    ``dropped_lengths`` [B], the windows without the blocks that the drawn question needs.
    """

    def __init__(self, cases: Cases, batch: int):
        self.cases, self.batch = cases, batch

    def __getitem__(self, index: int) -> dict:
        cases = [self.cases[n] for n in range(index * self.batch, (index + 1) * self.batch)]
        window, lengths = padded([case.window for case in cases])
        dropped, those = padded([case.dropped for case in cases])
        pairs = [[case.pair, *case.more] for case in cases]
        longest = max(len(asked) + len(answer) for row in pairs for asked, answer in row)
        shape = len(cases), max(map(len, pairs)), longest
        ids, answers = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        for n, row in enumerate(pairs):
            for q, (asked, answer) in enumerate(row):
                end = len(asked) + len(answer)
                ids[n, q, :end], answers[n, q, len(asked) : end] = torch.tensor([*asked, *answer]), True
        about = {"asked": ids, "answers": answers}
        return {"window": window, "lengths": lengths, "dropped": dropped, "dropped_lengths": those, **about}


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids of each row -> ids [B, T], 0 behind a shorter one, and lengths [B]."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True), torch.tensor([*map(len, rows)])


class KnowledgeData(Resumable):
    """Training batches and held-out questions of a core, resumed to the exact batch.

    Args:
        source: of the prose between the facts, training texts for training, held-out ones for questions.
        tokenizer: a Hugging Face tokenizer.
        block, tokens, entities, between, changed, hops, alike, questions, session, seed: see ``Cases``.
        batch: B, windows.
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
        alike: Share,
        questions: Count,
        session: Whole,
        batch: Count,
        validation_questions: Count = 64,
        seed: Whole = 0,
        workers: Whole = 0,
    ):
        super().__init__()
        self.source, self.tokenizer, self.batch, self.seed, self.workers = source, tokenizer, batch, seed, workers
        self.row, self.held_out = tokens, validation_questions
        self.settings = dict(block=block, tokens=tokens, entities=entities, between=between, changed=changed, hops=hops)
        self.settings |= dict(alike=alike, questions=questions, session=session, seed=seed)

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
        """Tokens of the windows of the first ``steps`` steps, at most, each once, with a question each."""
        return steps * self.each * self.batch * self.row

    def train_dataloader(self):
        return self.loader(self.training, sampler=self.indices(), num_workers=self.workers)

    def val_dataloader(self):
        mine = self.share(self.held_out, f"datamodule.validation_questions={self.held_out}")
        return DataLoader(self.validation, batch_size=None, sampler=mine)


def prose(rows, tokenizer, split: str) -> list[str]:
    """Sentences of the texts on one side of the split, prose first; a side without any has those of all texts.

    Raises:
        ValueError: there are none.
    """
    sides, domains = (rows.data.column(name).to_pylist() for name in ("split", "domain"))
    texts = Views(rows)
    order = sorted(range(len(texts)), key=lambda n: (sides[n] != split, domains[n] != NARRATIVE))
    found: list[str] = []
    for n in order:
        if len(found) >= PROSE or (found and sides[n] != split):
            return found[:PROSE]
        found += sentences([tokenizer.decode(texts[n])])
    if not found:
        raise ValueError("data: there is no sentence of prose in the texts; give others")
    return found
