"""What drafts save: tokens per pass of the base LM, and time per token, of greedy answers behind texts.

    python -m megactx.studies.speculative                          the embedded models and text
    python -m megactx.studies.speculative smollm2 --path TEXTS

Drafts come from the text itself: behind the newest place where the newest tokens stood before (prompt lookup), out of
the block behind the one whose gist is nearest to the newest gist, or out of the block whose gist is nearest to the one
that a readout foretells. The tokens are the same for all, and that is checked.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from megactx.evaluation.bootstrap import mean_interval
from megactx.evaluation.table import Report, Table, cell, pivot
from megactx.framework.bar import bar
from megactx.parts.models import Models
from megactx.runtime.speculative import Drafter, Gists, Lookup, Speculative

from .prediction import models_of, stage_of
from .study import Options, command, usable
from .trained import held_out

NONE = "no drafts"
EVERY = 10**6
LEGEND = (
    "Tokens per pass: 1 without drafts. Taken: share of drafted tokens that the base LM says too. Speed: time per token"
    " without drafts over that with them, the time for gists counted in. Brackets: 95 %, bootstrap over texts."
)


def options(given: Options) -> None:
    about = "base, GistNet and readout: an asset, an export, a run of experiment=mega_prediction"
    given.add("model", nargs="?", metavar="MODEL", help=f"{about}; without it the embedded models")
    given.path()
    given.number("prompt", 1024, "tokens of a text that are read", least=64)
    given.number("answer", 128, "tokens that follow", least=8)
    given.number("documents", 12, "documents", least=2)
    given.add("--out", type=Path, default=Path("speculative"), help="folder of the tables")


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """Decode every text with each kind of draft.

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
    base = models.base
    batches = held_out(base, args.path, models.gistnet.block_size, 1, args.prompt, EVERY)[: args.documents]
    about = {"model": args.model, "path": args.path, "prompt": args.prompt, "answer": args.answer}
    rows: list[dict[str, Speculative]] = []
    for batch in bar("documents")(batches):
        prompt, done = batch["ids"][0].tolist(), {}
        for name, drafter in drafters(models).items():
            done[name] = Speculative(base, drafter)
            done[name].generate(prompt, args.answer)
        rows.append(done)
        yield stem, report(rows, about)


def drafters(models: Models) -> dict[str, Drafter]:
    """A new one of each kind."""
    found = {NONE: Drafter(), "prompt lookup": Lookup(), "behind the nearest gist": Gists(models)}
    if models.prediction is not None:
        found["block of the foretold gist"] = Gists(models, models.prediction)
    return found


def report(rows: list[dict[str, Speculative]], about: dict) -> Report:
    """As tables; texts on which an arm rounded a near tie otherwise are counted, and left out of its figures."""
    table = Table()
    for name in rows[0]:
        same = [(n, row) for n, row in enumerate(rows) if row[name].tokens == row[NONE].tokens]
        kept = [(n, row[name].tally, row[NONE].tally) for n, row in same]
        table.add("same", len(kept), carrier=name, n=len(rows))
        if not kept:
            continue
        owner = torch.tensor([n for n, _, _ in kept])
        speed = [(none.seconds / none.tokens) / (own.seconds / own.tokens) for _, own, none in kept]
        figures = {"tokens_per_pass": [own.per_pass for _, own, _ in kept], "speed": speed}
        for metric, values in figures.items():
            table.add(metric, mean_interval(owner, torch.tensor(values)), carrier=name, n=len(kept))
        drafted = sum(own.drafted for _, own, _ in kept)
        table.add("taken", sum(own.accepted for _, own, _ in kept) / drafted if drafted else None, carrier=name)
        table.add("ms", 1e3 * sum(own.seconds / own.tokens for _, own, _ in kept) / len(kept), carrier=name)
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
    return cell(row, ".0%") if row else "-"


main = command("speculative", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
