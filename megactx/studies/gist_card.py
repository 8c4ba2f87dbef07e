"""What a GistNet is worth on text that it was not trained on: one command makes its card anew.

    python -m megactx.studies.gist_card smollm2 --path TEXTS                  base and GistNet that belong together
    python -m megactx.studies.gist_card smollm2 --gistnet FOLDER --horizon 16 --segments 200

Single blocks, each replaced by its gist, beside every untrained control on the same blocks; and, with ``--segments``,
histories of which all old blocks are gists; with ``--oracle``, what a vector can do that is fitted to each block
without an encoder. Recovery is the teacher-normalised score of the literature, of negative log-likelihoods:
(compressed - nothing) / (full - nothing).
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from megactx.data.spans import evenly
from megactx.evaluation.history import measure_history, segments
from megactx.evaluation.measure import measure, untrained
from megactx.evaluation.report import report_of
from megactx.evaluation.summary import summarise
from megactx.evaluation.table import Report
from megactx.framework.bar import bar
from megactx.gist.carriers.oracle import Oracle
from megactx.parts.models import load_models
from megactx.parts.read import gistnet_of

from .kept import identity, kept
from .ladder import ORACLES, first_blocks
from .study import Options, at_least, chosen, command, multiple, usable
from .trained import held_out

EVERY = 10**6  # blocks: of all documents


def options(given: Options) -> None:
    about = "base and GistNet: an asset, an exported folder, a run; without it the embedded ones"
    given.add("model", nargs="?", metavar="MODEL", help=about)
    given.add(
        "--gistnet", metavar="PATH", help="another GistNet of that base: asset:NAME, a folder, a checkpoint, a run"
    )
    given.path()
    given.number("blocks", 200, "blocks, about")
    given.number("horizon", 32, "H, tokens that are scored behind a block")
    given.number("tokens", 1024, "tokens of each document", least=128)
    given.number("segments", 0, "segments of history mode; 0: none", least=0)
    given.add("--documents", type=int, help="that they are of: fewer are faster (default: all)")
    given.number("segment", 64, "S, scored tokens of a segment")
    given.number("recency", 128, "R, raw tokens before it")
    given.controls()
    given.number("oracle", 0, "blocks that get a fitted vector each; 0: none", least=0)
    given.number("oracle-steps", 100, "steps of each fit")
    given.add("--precision", choices=("32-true", "bf16-mixed"), default="32-true", help="of products (default 32-true)")
    given.add("--out", type=Path, default=Path("gist_card"), help="folder of the tables")


def study(asked: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """Measure a GistNet.

    Raises:
        ValueError: the model has none, or no text is long enough; the message names the option.
    """
    stem = usable(asked.out) / "gist_card"
    models = load_models(asked.model, setting="MODEL")
    base, net = models.base, models.gistnet
    if asked.gistnet:
        net = gistnet_of(asked.gistnet, base, "--gistnet", slots=True).to(base.model.device)
    if net is None:
        raise ValueError(f"MODEL={asked.model}: there is no GistNet for it, give one: --gistnet PATH")
    block = net.block_size
    for name in ("segment", "recency"):
        multiple(name, getattr(asked, name), block)
    if asked.documents is not None:
        at_least("documents", asked.documents, 1)
    nets = {"gistnet": net} | chosen(untrained(base, block, net.position), asked.controls)
    about = {"model": models.name, "gistnet": asked.gistnet, "text": asked.path}
    text = (base, asked.path, block, asked.horizon, asked.tokens)
    autocast = torch.autocast(base.model.device.type, torch.bfloat16, enabled=asked.precision == "bf16-mixed")
    with autocast:
        batches, shown = held_out(*text, asked.blocks), bar("blocks")
        scores = measure(base, {"gistnet": net}, batches, asked.horizon, progress=shown)

    def report(**extra) -> Report:
        made = report_of(summarise(scores, "gistnet", **extra))
        made.about |= about
        return made

    yield stem, report()
    if asked.segments:
        sizes = {"segment": asked.segment, "recency": asked.recency}
        texts = held_out(*text, EVERY)
        some = evenly(np.arange(len(texts)), asked.documents or len(texts))
        histories = segments([texts[index] for index in some], block, asked.segments, **sizes)
        if not histories:
            raise ValueError(
                f"--tokens={asked.tokens}: there is no room for a segment behind --recency={asked.recency}"
            )
        of = identity(base, nets, **sizes, precision=asked.precision)
        with autocast:
            history = kept(
                asked.out / "histories", of, histories, lambda some: measure_history(base, nets, some, **sizes)
            )
        yield stem, report(history=history)
    if asked.oracle:
        settings = {"position": net.position, "steps": asked.oracle_steps}
        fitted = {name: Oracle(asked.horizon, block, samples=count, **settings) for name, count in ORACLES.items()}
        some, shown = first_blocks(batches, asked.oracle), bar("a vector fitted to every block")
        with autocast:
            found = measure(base, {"gistnet": net} | fitted, some, asked.horizon, progress=shown)
        made = report_of(summarise(found, "gistnet"))
        made.about |= about
        yield stem.with_name("gist_card_oracle"), made


main = command("gist_card", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
