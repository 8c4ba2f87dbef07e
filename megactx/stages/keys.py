"""Train keys of blocks for a base LM: questions about facts told in texts, and about passages of them (``focus.keys``).

Facts are those of ``data.ruler``, some in other words; the words of ``data.paraphrases.MEASURED`` are never trained on.
"""

import random
from pathlib import Path

import numpy as np
import torch

from megactx.data import paraphrases, ruler
from megactx.data.documents import tokenised
from megactx.data.embedded import Embedded
from megactx.data.files import Files
from megactx.focus import key_training as training
from megactx.focus.keys import QUESTION, KeyNet, Keys
from megactx.focus.sentence_keys import SentenceKeys
from megactx.framework.bar import bar
from megactx.lm import BaseLM
from megactx.lm.sentences import SentenceEncoder, fastest
from megactx.parts.write import save_keys

BLOCK, HELD_OUT = 32, 10
DOCUMENTS, BLOCKS, TOLD, ASKED, NOTHING, HARD = (
    4,
    96,
    20,
    10,
    2,
    8,
)  # of a step; the last five of a document or question
RATE = 3e-3
FRAMES = (("", ""), ("What does the text say about", "?\n"), ("", "\nWho wrote this, and what comes next?"))


def texts(tokenizer, path: str | None, documents: int, tokens: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Ids in whole blocks: of training, and held out. Where few texts are long enough, short ones are joined.

    Raises:
        ValueError: too few documents are asked for, or there is too little text.
    """
    least, few = BLOCK * BLOCKS, 2 * HELD_OUT
    if documents < few:
        raise ValueError(f"--documents={documents} is not allowed: at least {few}, one in {HELD_OUT} is held out")
    rows = tokenised(Files(path) if path else Embedded(), tokenizer)
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    found = []
    for together in (False, True):
        found, held = [], []
        for at in order:
            held = [*held, *rows[at]["input_ids"][: tokens - len(held)]]
            if len(held) >= least:
                found.append(torch.tensor(held[: len(held) // BLOCK * BLOCK]))
            held = held if together and len(held) < least else []
            if len(found) == documents:
                break
        if len(found) >= few:
            return [t for n, t in enumerate(found) if n % HELD_OUT], found[::HELD_OUT]
    raise ValueError(f"--path: there are {len(found)} texts of {least} tokens, at least {few} are needed")


class Teller:
    """Makes facts, and questions about them, as ids."""

    def __init__(self, tokenizer, pairs):
        self.tokenizer, self.pairs = tokenizer, pairs

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def facts(self, draw: random.Random, kind: str, count: int) -> list[tuple[str, str]]:
        """(fact, question) each; those of one kind differ in what they are about."""
        if kind == "key":
            key = draw.choice([ruler._key, ruler._uuid])
            value, name = draw.choice([(ruler._number, "number"), (ruler._uuid, "uuid")])
            told, keys, _ = ruler._needles(draw, count, key, value, name)
            return [(fact, "".join(ruler._asked(k, name).values())) for fact, k in zip(told, keys, strict=True)]
        out = []
        for pair in draw.sample(self.pairs, count):
            word, other = draw.sample(pair, 2)
            form = draw.choice([paraphrases.TOLD, paraphrases.CHANGED])
            question = paraphrases.asked(other if kind == "paraphrase" else word)
            fact = form.format(word, draw.randrange(10**6, 10**7))
            out.append((fact, "".join(question.values())))
        return out


def step_of(pool: training.Pool, teller: Teller, frames, draw: random.Random, count: int = DOCUMENTS):
    """-> documents [D, N, K], the questions about each, hard blocks [C, K]."""
    documents, asked, hard = [], [], []
    for _ in range(count):
        whole = draw.choice(pool.documents)
        start = draw.randrange(len(whole) // BLOCK - BLOCKS + 1) * BLOCK
        ids = whole[start : start + BLOCKS * BLOCK].clone()
        pairs = teller.facts(draw, draw.choice(["key", "paraphrase", "paraphrase", "same"]), TOLD)
        places = training.put(ids, [teller.ids(f" {fact}") for fact, _ in pairs], BLOCK, draw)
        own = [
            training.Asked("told", teller.ids(question)[-QUESTION:], held, True)
            for (_, question), held in zip(pairs, places, strict=True)
        ]
        own += [training.of_text(ids, BLOCK, frames, draw) for _ in range(ASKED)]
        hard += [question.ids for question in own[-2:]]
        for _ in range(NOTHING):
            # Text that just goes on asks for nothing, however alike it is to what came before.
            behind = whole[start + BLOCKS * BLOCK :]
            other = behind if len(behind) > QUESTION else draw.choice(pool.documents)
            at = draw.randrange(len(other) - QUESTION)
            own.append(training.Asked("nothing", other[at : at + QUESTION].tolist(), []))
        documents.append(ids.view(BLOCKS, BLOCK))
        asked.append(own)
    blocks = pool.hard(hard, HARD + 2)
    # The first two may be the answer itself, which also stands in the pool.
    return torch.stack(documents), asked, blocks[:, 2:].reshape(-1, BLOCK)


def train(net: Keys, pool: training.Pool, teller: Teller, steps: int, seed: int) -> list[float]:
    """-> the loss of every step."""
    frames = [tuple(map(teller.ids, frame)) for frame in FRAMES]
    numbers = [net.scale, net.null]  # single numbers of size ten need larger steps than weights do
    others = [p for name, p in net.named_parameters() if name not in ("scale", "null")]
    rates = [RATE, 30 * RATE]
    groups = [{"params": part, "lr": rate} for part, rate in zip((others, numbers), rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.05)
    draw, losses = random.Random(seed), []
    # The encoder reads each block that a fact was put into: two texts of a step are half its time.
    count = 2 if isinstance(net, SentenceKeys) else DOCUMENTS
    for _ in bar("steps")(range(steps)):
        value = training.loss(net, *step_of(pool, teller, frames, draw, count))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.item())
    return losses


def train_keys(
    base: BaseLM,
    learned: list[torch.Tensor],
    folder: Path,
    steps: int,
    size: int = 64,
    seed: int = 0,
    sentences: bool = False,
) -> list[float]:
    """Train keys on ids in whole blocks, and write them; -> the loss of every step.

    Args:
        sentences: of the states of a sentence encoder.

    Raises:
        ValueError: its weights are not installed.
    """
    torch.manual_seed(seed)
    pool = training.Pool(learned, base.tokenizer, BLOCK)
    if sentences:
        net = SentenceKeys(base.tokenizer, SentenceEncoder("--sentences", fastest()).ready(), size)
        net.known = {}
    else:
        net = KeyNet(base.model.get_input_embeddings().weight, size)
        training.start_weights(net, pool.counts(len(net.weight)))
    losses = train(net, pool, Teller(base.tokenizer, paraphrases.LEARNED), steps, seed)
    save_keys(net, base, folder, f"megactx.stages.keys, {steps} steps, {len(learned)} documents, seed {seed}")
    return losses
