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

import torch

from megactx.data import paraphrases
from megactx.evaluation.bootstrap import wilson
from megactx.evaluation.policies.bm25 import okapi
from megactx.evaluation.table import Report, Sheet, Table, cell
from megactx.focus import key_training as training
from megactx.focus.keys import QUESTION, KeyNet, padded
from megactx.framework.bar import bar
from megactx.parts.models import load_models
from megactx.parts.read import load_keys
from megactx.stages.keys import BLOCK, BLOCKS, FRAMES, TOLD, Teller, texts, train_keys

from .study import Options, command, usable

MOST = 8  # blocks, with both neighbours each, that a window of 1,024 takes beside a quarter of newest tokens
LEGEND = f"Share of questions with all blocks of the answer among the best {MOST} and their neighbours; 95 %, Wilson."


def options(given: Options) -> None:
    given.add(
        "model", metavar="MODEL", help="whose embeddings are read: a folder, a GGUF file, or the name of an asset"
    )
    given.path("texts to train on; without it the embedded text")
    given.number("documents", 300, "of the text, at most")
    given.number("tokens", 4096, "of each document, at most", least=BLOCK * BLOCKS)
    given.number("steps", 1000, "of training")
    given.number("size", 64, "numbers of a key", least=16)
    given.number("cases", 60, "of each kind of question")
    given.number("haystack", 4096, "blocks among which a question is answered", least=MOST)
    given.number("seed", 0, "of all draws", least=0)
    given.add("--sentences", action="store_true", help="keys of the states of all-MiniLM-L6-v2, not of embeddings")
    given.add("--out", type=Path, default=Path("keys"), help="folder of the keys, with tables beside them")


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
            like = net.likeness(net(*padded([question.ids])), net.encode(blocks).float())[0]
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
    models = load_models(args.model, setting="MODEL")
    base, tokenizer = models.base, models.base.tokenizer
    learned, held_out = texts(tokenizer, args.path, args.documents, args.tokens)
    losses = train_keys(base, learned, args.out, args.steps, args.size, args.seed, args.sentences)
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


main = command("keys", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
