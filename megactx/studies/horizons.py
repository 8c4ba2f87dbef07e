"""How far a carrier is felt: recovery over horizons of 32, 64, 128 tokens behind the same blocks.

    python -m megactx.studies.horizons RUN [RUN ...]                      runs of gist stages, on the embedded text
    python -m megactx.studies.horizons RUN --path TEXTS --horizons 32 64 128

One packed pass over the longest horizon; a shorter one is its first offsets, so all are of the same blocks. With
several runs, such as seeds, of every one its compressors under its name.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from megactx.evaluation.bootstrap import difference_intervals, recovery_intervals, told
from megactx.evaluation.measure import measure
from megactx.evaluation.metrics import BODY
from megactx.evaluation.scores import BlockScores
from megactx.evaluation.table import BLOCK, Report, Sheet, Table, cell, pivot, stack
from megactx.framework.bar import bar
from megactx.gist.carriers.avgpool import AvgPool

from .study import Options, at_least, command
from .trained import held_out, load, same

FIRSTS = (1, BODY)  # offsets; keys and values predict nothing at h = 0
COST = "cost of a dropped block, nats"
LEGEND = (
    "recovery = 1 - sum dNLL / sum dNLL_drop over the offsets from h to the end of the horizon; brackets: 95 %,"
    " bootstrap over documents. below, above: than the first row's carrier by the paired bootstrap."
)


def summarise(scores: BlockScores, horizons: list[int]) -> Table:
    """Scores over the longest horizon -> the long table; the first carrier is what all are compared with."""
    table, (subject, *rest) = Table(), scores.carriers
    for horizon in sorted(horizons):
        own = scores.take(slice(None), slice(0, horizon))
        for first in FIRSTS:
            about = {"span": _span(horizon, first), "n": own.documents}
            found = {"recovery": recovery_intervals(own, [subject, *rest], first)}
            found["behind"] = difference_intervals(own, subject, rest, first)
            table.add_all(found, "metric", "carrier", **about)
            table.add(COST, own.cost(first), **about)
    return table


def _span(horizon: int, first: int) -> str:
    return f"H = {horizon}, h >= {first}"


def sheets(table: Table, horizons: list[int], counted: str) -> list[Sheet]:
    """A sheet of all offsets but the seam's first, and one of h >= 4."""

    def with_verdict(row: dict) -> str:
        said = told(table.one(metric="behind", carrier=row["carrier"], span=row["span"]))
        return f"{cell(row)} {said}".rstrip()

    out = []
    for first in FIRSTS:
        spans = {f"H = {horizon}": {"span": _span(horizon, first)} for horizon in sorted(horizons)}
        columns = [(heading, span | {"metric": "recovery"}, with_verdict) for heading, span in spans.items()]
        names, costs = table.names("carrier"), [(heading, span, ".3f") for heading, span in spans.items()]
        parts = (
            pivot("", table, columns, heading=BLOCK, strong=names[:1]),
            pivot("", table, costs, "metric", "", [COST]),
        )
        out.append(stack(f"recovery over h >= {first} ({counted})", *parts))
    return out


def options(given: Options) -> None:
    given.runs("run folders of gist stages, of one block size")
    given.path()
    given.add("--horizons", type=int, nargs="+", default=[32, 64, 128], help="tokens")
    given.number("tokens", 1024, "of a document")
    given.number("blocks", 1000, "about so many")


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """Measure the compressors of runs at several horizons.

    Raises:
        ValueError: a setting that is not allowed, runs that do not belong together, or no text that is long enough.
    """
    horizons = args.horizons
    if min(horizons) <= BODY or len({*horizons}) < len(horizons):
        raise ValueError(f"--horizons={horizons} is not allowed: different ones, each above {BODY}")
    runs = load(args.runs)
    same(runs)
    base, block = runs[0].base, runs[0].main.block_size
    at_least("tokens", args.tokens, 2 * block + max(horizons), ", a sink, a block and the longest horizon")
    several = len(runs) > 1
    nets = {f"{run.name}: {name}" if several else name: net for run in runs for name, net in run.nets.items()}
    nets = {name: net.to(base.model.device) for name, net in nets.items()} | {"avgpool": AvgPool(block)}
    batches = held_out(base, args.path, block, max(horizons), args.tokens, args.blocks)
    scores = measure(base, nets, batches, max(horizons), progress=bar("all carriers"))
    table, documents = summarise(scores, horizons), scores.documents
    about = {"subject": next(iter(nets)), "base": runs[0].base_name, "text": args.path, "tokens": args.tokens}
    about |= {"blocks": len(scores), "documents": documents, "hash": scores.block_hash()}
    counted = f"{len(scores):,} blocks of {documents:,} documents, hash {scores.block_hash()}"
    report = Report("Horizons", table, sheets(table, horizons, counted), LEGEND, about=about)
    yield runs[0].folder / "horizons", report


main = command("horizons", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
