"""How far a carrier is felt: recovery over horizons of 32, 64, 128 tokens behind the same blocks.

    python -m megactx.studies.horizons RUN [RUN ...]                      runs of gist stages, on the embedded text
    python -m megactx.studies.horizons RUN --path TEXTS --horizons 32 64 128

One packed pass over the longest horizon; a shorter one is its first offsets, so all are of the same blocks. With
several runs, such as seeds, of every one its compressors under its name.
"""

import argparse
import sys

from megactx.evaluation.bootstrap import difference_intervals, recovery_intervals, reverse, verdict
from megactx.evaluation.measure import measure
from megactx.evaluation.metrics import BODY
from megactx.evaluation.scores import BlockScores
from megactx.evaluation.sheets import Sheet
from megactx.framework.bar import bar
from megactx.framework.command_line import run
from megactx.gist.carriers.avgpool import AvgPool

from .tables import interval, show, write
from .trained import Trained, held_out, load, same

BANDS = {"recovery": 1, "body": BODY}  # name -> first offset; keys and values predict nothing at h = 0
NOTE = (
    "recovery = 1 - sum dNLL / sum dNLL_drop over the offsets from h to the end of the horizon; brackets: 95 %,"
    " bootstrap over documents. below, above: than the first row's carrier by the paired bootstrap."
)


def study(runs: list[Trained], path: str | None, horizons: list[int], tokens: int, blocks: int) -> dict:
    """Measure the compressors of runs at several horizons; -> plain numbers.

    Raises:
        ValueError: a setting that is not allowed, runs that do not belong together, or no text that is long enough.
    """
    if min(horizons) <= BODY or len({*horizons}) < len(horizons):
        raise ValueError(f"--horizons={horizons} is not allowed: different ones, each above {BODY}")
    if blocks < 1:
        raise ValueError(f"--blocks={blocks} is not allowed: at least 1")
    same(runs)
    base, block = runs[0].base, runs[0].main.block_size
    if tokens < (least := 2 * block + max(horizons)):
        raise ValueError(f"--tokens={tokens} is not allowed: at least {least}, a sink, a block and the longest horizon")
    several = len(runs) > 1
    nets = {f"{run.name}: {name}" if several else name: net for run in runs for name, net in run.nets.items()}
    nets = {name: net.to(base.model.device) for name, net in nets.items()} | {"avgpool": AvgPool(block)}
    batches = held_out(base, path, block, max(horizons), tokens, blocks)
    scores = measure(base, nets, batches, max(horizons), progress=bar("all carriers"))
    subject, rest = next(iter(nets)), [name for name in scores.carriers if name != next(iter(nets))]
    out = {"subject": subject, "base": runs[0].base_name, "text": path, "tokens": tokens, "blocks": len(scores)}
    out |= {"documents": scores.document.unique().numel(), "hash": scores.block_hash(), "horizons": {}}
    for horizon in sorted(horizons):
        own, found = _first(scores, horizon), {}
        for name, first in BANDS.items():
            cost = (own.drop - own.full)[:, first:].double().mean().item()
            recovery = recovery_intervals(own, list(own.carriers), first)
            below = difference_intervals(own, subject, rest, first)
            found[name] = {"cost": cost, "recovery": {k: v._asdict() for k, v in recovery.items()}}
            found[name]["below_subject"] = {k: v._asdict() for k, v in below.items()}
        out["horizons"][horizon] = found
    return out


def _first(scores: BlockScores, horizon: int) -> BlockScores:
    """The same blocks over a shorter horizon."""
    carriers = {name: values[:, :horizon] for name, values in scores.carriers.items()}
    about = {"domain": scores.domain, "document": scores.document, "start": scores.start}
    return BlockScores(full=scores.full[:, :horizon], drop=scores.drop[:, :horizon], carriers=carriers, **about)


def sheets(numbers: dict) -> list[Sheet]:
    """A table of all offsets but the seam's first, and one of h >= 4."""
    counted = f"{numbers['blocks']:,} blocks of {numbers['documents']:,} documents, hash {numbers['hash']}"
    out = []
    for band, first in BANDS.items():
        found = {horizon: bands[band] for horizon, bands in numbers["horizons"].items()}
        names = list(next(iter(found.values()))["recovery"])
        rows = [[name, *[_cell(bands, name) for bands in found.values()]] for name in names]
        rows.append(["cost of a dropped block, nats", *[f"{bands['cost']:.3f}" for bands in found.values()]])
        header = ["in place of the block", *[f"H = {horizon}" for horizon in found]]
        out.append(Sheet(f"recovery over h >= {first} ({counted})", header, rows, (0,)))
    return out


def _cell(bands: dict, name: str) -> str:
    text, difference = interval(bands["recovery"][name]), bands["below_subject"].get(name)
    if not difference or difference["low"] != difference["low"]:
        return text
    return f"{text} {verdict(reverse(difference))}"


def rows_of(numbers: dict) -> list[dict]:
    """A row per carrier, horizon and band."""
    return [
        {"carrier": name, "horizon": horizon, "first": BANDS[band], **value}
        for horizon, bands in numbers["horizons"].items()
        for band, found in bands.items()
        for name, value in found["recovery"].items()
    ]


def command(asked: argparse.Namespace) -> None:
    """Measure, show and write."""
    runs = load(asked.runs)
    numbers = study(runs, asked.path, asked.horizons, asked.tokens, asked.blocks)
    tables = sheets(numbers)
    show(tables, [NOTE])
    stem = runs[0].folder / "horizons"
    write(stem, "Horizons", tables, [NOTE], rows_of(numbers), numbers)
    print(f"Horizons: {stem}.md, .csv and .json")


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.studies.horizons", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of gist stages, of one block size")
    parser.add_argument("--path", help="files to measure on; without it the held-out part of the embedded text")
    parser.add_argument("--horizons", type=int, nargs="+", default=[32, 64, 128], help="default 32 64 128")
    parser.add_argument("--tokens", type=int, default=1024, help="of a document (default 1024)")
    parser.add_argument("--blocks", type=int, default=1000, help="about so many (default 1000)")
    return run(command, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
