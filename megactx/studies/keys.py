"""Train keys of blocks for a base LM, and see what questions find by them: recall beside BM25 on texts held out.

    python -m megactx.studies.keys smollm2 --path TEXTS --out keys

Questions are about facts that are written into the texts (as in ``data.ruler``, some in other words), and about
passages of the texts themselves. Every tenth text is held out. The words of ``data.paraphrases.MEASURED`` are never
trained on.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from megactx.data import paraphrases, ruler
from megactx.data.documents import tokenised
from megactx.data.embedded import Embedded
from megactx.data.files import Files
from megactx.evaluation.bootstrap import wilson
from megactx.evaluation.policies.bm25 import okapi
from megactx.evaluation.table import Report, Sheet, Table, cell
from megactx.focus import key_training as training
from megactx.focus.keys import QUESTION, KeyNet
from megactx.framework.bar import bar
from megactx.lm import BaseLM
from megactx.parts.models import load_models
from megactx.parts.read import load_keys
from megactx.parts.write import save_keys

from .study import Options, command, usable

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
MOST = 8  # blocks, with both neighbours each, that a window of 1,024 takes beside a quarter of newest tokens
FRAMES = (("", ""), ("What does the text say about", "?\n"), ("", "\nWho wrote this, and what comes next?"))
LEGEND = f"Share of questions with all blocks of the answer among the best {MOST} and their neighbours; 95 %, Wilson."


def options(given: Options) -> None:
    given.add("model", help="whose embeddings are read: a folder, a GGUF file, or the name of an asset")
    given.path("texts to train on; without it the embedded text")
    given.number("documents", 300, "of the text, at most")
    given.number("tokens", 4096, "of each document, at most", least=BLOCK * BLOCKS)
    given.number("steps", 1000, "of training")
    given.number("size", 64, "numbers of a key", least=16)
    given.number("cases", 60, "of each kind of question")
    given.number("haystack", 4096, "blocks among which a question is answered", least=MOST)
    given.number("seed", 0, "of all draws", least=0)
    given.add("--out", type=Path, default=Path("keys"), help="folder of the keys, with tables beside them")


def texts(tokenizer, path: str | None, documents: int, tokens: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Ids in whole blocks: of training, and held out.

    Raises:
        ValueError: too few texts are long enough.
    """
    rows, found = tokenised(Files(path) if path else Embedded(), tokenizer), []
    for at in np.random.default_rng(0).permutation(len(rows)).tolist():
        ids = torch.tensor(rows[at]["input_ids"][:tokens])
        if len(ids) >= BLOCK * BLOCKS:
            found.append(ids[: len(ids) // BLOCK * BLOCK])
        if len(found) == documents:
            break
    if len(found) < 2 * HELD_OUT:
        raise ValueError(f"--path: {len(found)} texts have {BLOCK * BLOCKS} tokens, at least {2 * HELD_OUT} are needed")
    return [t for n, t in enumerate(found) if n % HELD_OUT], found[::HELD_OUT]


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


def step_of(pool: training.Pool, teller: Teller, frames, draw: random.Random):
    """-> documents [D, N, K], the questions about each, hard blocks [C, K]."""
    documents, asked, hard = [], [], []
    for _ in range(DOCUMENTS):
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


def train(net: KeyNet, pool: training.Pool, teller: Teller, steps: int, seed: int) -> list[float]:
    """-> the loss of every step."""
    frames = [tuple(map(teller.ids, frame)) for frame in FRAMES]
    numbers = [net.scale, net.null]  # single numbers of size ten need larger steps than weights do
    others = [p for name, p in net.named_parameters() if name not in ("scale", "null")]
    rates = [RATE, 30 * RATE]
    groups = [{"params": part, "lr": rate} for part, rate in zip((others, numbers), rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.05)
    draw, losses = random.Random(seed), []
    for _ in bar("steps")(range(steps)):
        value = training.loss(net, *step_of(pool, teller, frames, draw))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.item())
    return losses


@torch.no_grad()
def recall(net: KeyNet, held_out: list[torch.Tensor], teller: Teller, args: argparse.Namespace) -> Table:
    """How often the blocks of an answer are among the best, for keys and BM25."""
    table, draw = Table(), random.Random(f"measured/{args.seed}")
    hay = torch.cat(held_out)[: args.haystack * BLOCK]
    frames = [tuple(map(teller.ids, frame)) for frame in FRAMES]
    for kind in ("key", "paraphrase", "same", "text"):
        found, above = {"keys": [], "bm25": []}, []
        for _ in bar(kind)(range(args.cases)):
            ids = hay.clone()
            if kind == "text":
                question = training.of_text(ids, BLOCK, frames, draw)
            else:
                facts = teller.facts(draw, kind, TOLD)
                places = training.put(ids, [teller.ids(f" {fact}") for fact, _ in facts], BLOCK, draw)
                question = training.Asked(kind, teller.ids(facts[0][1])[-QUESTION:], places[0])
            blocks = ids.view(-1, BLOCK)
            like = net.likeness(net(*training.padded([question.ids])), net.encode(blocks).float())[0]
            above.append(bool(like.max() > net.null))
            texts = teller.tokenizer.batch_decode(blocks.tolist())
            words = okapi(texts, teller.tokenizer.decode(question.ids))
            for name, values in (("keys", like), ("bm25", words)):
                best = values.argsort(descending=True, stable=True)[:MOST].tolist()
                found[name].append({*question.blocks} <= {near for at in best for near in (at - 1, at, at + 1)})
        for name, right in found.items():
            table.add("recall", wilson(sum(right), len(right))._asdict(), carrier=name, domain=kind, n=len(right))
        table.add("opened", wilson(sum(above), len(above))._asdict(), carrier="keys", domain=kind, n=len(above))
    return table


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """Train, measure, write.

    Raises:
        ValueError: too little text, or a size that is not allowed.
    """
    usable(args.out.parent)
    models = load_models(args.model)
    base, tokenizer = models.base, models.base.tokenizer
    learned, held_out = texts(tokenizer, args.path, args.documents, args.tokens)
    torch.manual_seed(args.seed)
    net = KeyNet(embeddings_of(base), args.size)
    pool = training.Pool(learned, tokenizer, BLOCK)
    training.start_weights(net, pool.counts(len(net.weight)))
    losses = train(net, pool, Teller(tokenizer, paraphrases.LEARNED), args.steps, args.seed)
    made_by = f"megactx.studies.keys, {args.steps} steps, {len(learned)} documents, seed {args.seed}"
    save_keys(net, base, args.out, made_by)
    net = load_keys(args.out, base)  # what was written is what is measured
    table = recall(net, held_out, Teller(tokenizer, paraphrases.MEASURED), args)
    last = losses[-max(1, len(losses) // 10) :]
    notes = [f"Loss of the first step {losses[0]:.3f}, of the last tenth {sum(last) / len(last):.3f}."]
    notes.append("opened: the best block is more like the question than a question about nothing is to any.")
    sheet = Sheet(
        f"{args.cases} questions of a kind among {args.haystack:,} blocks held out",
        ["question", "keys", "bm25", "opened"],
        [
            [kind, *(cell(table.one(carrier=c, domain=kind, metric=m)) for c, m in COLUMNS)]
            for kind in table.names("domain")
        ],
    )
    about = {"model": args.model, "steps": args.steps, "size": args.size, "seed": args.seed, "documents": len(learned)}
    about |= {"scale": float(net.scale), "null": float(net.null)}
    yield (
        args.out.with_name(f"{args.out.name}-recall"),
        Report(f"Keys: {args.model}", table, [sheet], LEGEND, notes, about),
    )


COLUMNS = (("keys", "recall"), ("bm25", "recall"), ("keys", "opened"))


def embeddings_of(base: BaseLM) -> torch.Tensor:
    """[V, D]"""
    return base.model.get_input_embeddings().weight


main = command("keys", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
