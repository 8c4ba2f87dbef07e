"""What drafts save: tokens per pass of the base LM, and time per token, of greedy answers of sessions behind texts.

    python -m megactx.studies.speculative                          the embedded models and text
    python -m megactx.studies.speculative smollm2 --path TEXTS

Drafts come from the text itself: behind the newest place where the newest tokens stood before (prompt lookup), out of
the block behind the one whose gist is nearest to the newest gist, or out of the block whose gist is nearest to the one
that a readout foretells. The tokens are the same for all, and that is checked.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megactx.evaluation.bootstrap import mean_interval
from megactx.evaluation.table import Report, Table, cell, pivot
from megactx.framework.bar import bar
from megactx.parts.models import Models
from megactx.runtime import Controller, Sampling, Settings
from megactx.runtime.controller import decode
from megactx.runtime.settings import DRAFTS

from .prediction import models_of, stage_of
from .study import Options, command, usable
from .trained import held_out

EVERY = 10**6
NAMES = {
    "none": "no drafts",
    "lookup": "prompt lookup",
    "nearest": "behind the nearest gist",
    "foretold": "block of the foretold gist",
}
LEGEND = (
    "Tokens per pass of the base LM, and speed, time per token without drafts over that with them: refocuses counted"
    " in. Taken: share of drafted tokens that the base LM says too. Brackets: 95 %, bootstrap over texts."
)


@dataclass(frozen=True)
class Said:
    """An answer, and what it took."""

    tokens: list[int]
    seconds: float
    passes: int  # of the base LM
    taken: int  # of drafts
    vain: int


def options(given: Options) -> None:
    about = "base, GistNet and readout: an asset, an export, a run of experiment=mega_prediction"
    given.add("model", nargs="?", metavar="MODEL", help=f"{about}; without it the embedded models")
    given.path()
    given.number("budget", 2048, "entries of the working context")
    given.number("prompt", 1024, "tokens of a text that are read", least=64)
    given.number("answer", 128, "tokens that follow", least=8)
    given.number("documents", 12, "documents", least=2)
    given.add("--out", type=Path, default=Path("speculative"), help="folder of the tables")


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """Answer behind every text with each kind of draft, in turn, so that all see the same machine.

    Raises:
        ValueError: there is no GistNet, or no text that is long enough.
    """
    stem = usable(args.out) / "speculative"
    stage = stage_of(args.model)
    if stage and stage.reader is not None:
        raise ValueError(f"RUN={args.model}: its GistNet is of another base LM, so there is nothing to draft by")
    models = models_of(args.model, stage)
    if models.gistnet is None:
        raise ValueError(f"MODEL={args.model}: there is no GistNet for it")
    kinds = [kind for kind in DRAFTS if kind != "foretold" or models.prediction is not None]
    batches = held_out(models.base, args.path, models.gistnet.block_size, 1, args.prompt, EVERY)[: args.documents]
    about = {name: getattr(args, name) for name in ("model", "path", "budget", "prompt", "answer")}
    rows: list[dict[str, Said]] = []
    for batch in bar("documents")(batches):
        rows.append({kind: said(models, kind, batch["ids"], args.budget, args.answer) for kind in kinds})
        yield stem, report(rows, about)


def said(models: Models, drafts: str, ids: torch.Tensor, budget: int, answer: int) -> Said:
    """What a session answers behind ids [1, T]."""
    counts, passes = [], []
    controller = Controller(models, Settings(budget=budget, drafts=drafts))
    stream = controller.stream(observers=[lambda event: counts.append(event.drafts or (0, 0))])
    stream.append(ids.to(stream.device))
    stream.logits()
    counting = models.base.register_forward_hook(lambda *_: passes.append(1))
    began = time.perf_counter()
    tokens = [token for (token,) in decode(stream, answer, Sampling())]
    stream.logits()  # without drafts the last token is read, so with them too
    seconds = time.perf_counter() - began
    counting.remove()
    return Said(tokens, seconds, len(passes), *(sum(own) for own in zip(*counts, stream.drafts, strict=True)))


def report(rows: list[dict[str, Said]], about: dict) -> Report:
    """As tables; texts on which an arm rounded a near tie otherwise are counted, and left out of its figures."""
    table = Table()
    for kind in rows[0]:
        name, none = NAMES[kind], DRAFTS[0]
        kept = [(n, row[kind], row[none]) for n, row in enumerate(rows) if row[kind].tokens == row[none].tokens]
        table.add("same", len(kept), carrier=name, n=len(rows))
        if not kept:
            continue
        owner = torch.tensor([n for n, _, _ in kept])
        figures = {
            "tokens_per_pass": [len(own.tokens) / own.passes for _, own, _ in kept],
            "speed": [plain.seconds / own.seconds for _, own, plain in kept],
        }
        for metric, values in figures.items():
            table.add(metric, mean_interval(owner, torch.tensor(values)), carrier=name, n=len(kept))
        taken, vain = (sum(getattr(own, part) for _, own, _ in kept) for part in ("taken", "vain"))
        table.add("taken", taken / (taken + vain) if taken + vain else None, carrier=name)
        each = sum(own.seconds / len(own.tokens) for _, own, _ in kept)
        table.add("ms", 1e3 * each / len(kept), carrier=name)
    columns = [
        ("tokens per pass", "tokens_per_pass"),
        ("taken", "taken", _share),
        ("speed", "speed"),
        ("ms", "ms", ".1f"),
    ]
    columns += [("same tokens", "same", lambda row: f"{row['point']} of {row['n']}" if row else "-")]
    counted = f"{len(rows)} texts, {about['answer']} tokens behind {about['prompt']:,}"
    return Report("Drafts", table, [pivot(counted, table, columns, heading="drafts from")], LEGEND, about=about)


def _share(row: dict | None) -> str:
    return cell(row, ".0%") if row and row["point"] is not None else "-"


main = command("speculative", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
