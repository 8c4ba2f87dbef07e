"""What a block may be: finished ladders that differ in their block size, in one table and one picture.

    python -m megactx.studies.ladder block_size=8 folder=runs/k8 ...       one ladder per size, of the same text
    python -m megactx.studies.block_sizes runs/k8 runs/k16 runs/k32        recovery by block size

Blocks of other sizes are other blocks, so what dropping one costs stands beside what its carriers recover of it. Runs
of the same size, such as seeds, are combined.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from megactx.evaluation.pictures import colours_of, legend, line, panel, picture, powers
from megactx.evaluation.table import BLOCK, Report, Sheet, Table, pivot, stack

from .ladder import read_ladder
from .ladder_report import COMPARED, combine, table_of
from .study import Options, command, usable

SPANS = {"h >= 1": "one block, h >= 1", "h >= 4": "one block, h >= 4", "history": "history"}
LEGEND = (
    "recovery = 1 - sum dNLL / sum dNLL_drop. Brackets: 95 %, bootstrap over documents; with several runs of a size ±"
    " is their standard deviation. cost of none: dNLL in nats per token with the block dropped, or all blocks of the"
    " history."
)


def by_size(runs: list[dict]) -> dict[int, dict]:
    """Ladders of several block sizes -> block size -> the ladder of all its runs, smallest first.

    Raises:
        ValueError: another base, horizon or subject, a single block size, or no carrier in common.
    """
    for name in ("base", "horizon", "subject"):
        if len(found := {str(run[name]) for run in runs}) > 1:
            raise ValueError(f"block_sizes: the runs differ in {name}: {', '.join(sorted(found))}")
    sizes = sorted({run["block_size"] for run in runs})
    if len(sizes) < 2:
        raise ValueError(f"block_sizes: all runs have block_size={sizes[0]}; give ladders of at least two sizes")
    ladders = {size: combine([run for run in runs if run["block_size"] == size]) for size in sizes}
    if not set.intersection(*[{*ladder["carriers"]} for ladder in ladders.values()]):
        raise ValueError("block_sizes: the runs have no carrier in common")
    return ladders


def costs(ladder: dict) -> dict[str, float | None]:
    """Span -> what having nothing costs, in nats per token."""
    dropped = ladder["by_offset"]["dropped"]
    means = {span: sum(dropped[h:]) / max(1, len(dropped) - h) for span, h in (("h >= 1", 1), ("h >= 4", 4))}
    return means | {"history": ladder.get("cost_of_no_history")}


def long_table(ladders: dict[int, dict]) -> Table:
    """Carriers that every size has, with the block size as the run, best at the smallest first; and the costs."""
    tables = {size: table_of(ladder) for size, ladder in ladders.items()}
    first = next(iter(tables.values())).pick(metric="recovery", span=COMPARED["recovery"], domain=None)
    names = [name for name in first.ranked() if all(name in ladder["carriers"] for ladder in ladders.values())]
    out = Table(
        {"run": size, **row} for name in names for size, own in tables.items() for row in own.pick(carrier=name)
    )
    for size, ladder in ladders.items():
        out.add_all(costs(ladder), "span", metric="cost of none, nats", run=size)
    return out


def sheets(ladders: dict[int, dict], table: Table) -> list[Sheet]:
    """A sheet for each span that was measured."""
    each = {k: f"{run['blocks']:,} blocks of {run['documents']:,} documents" for k, run in ladders.items()}
    alike = f"{each[min(each)]} each" if len({*each.values()}) == 1 else ""
    counted = alike or ", ".join(f"{k}: {text}" for k, text in each.items())
    columns, out = [(str(size), {"run": size}) for size in ladders], []
    nats = [(*column, ".3f") for column in columns]
    for span, title in SPANS.items():
        own = table.pick(span=span, domain=None)
        if recovery := own.pick(metric="recovery"):
            subject = ladders[min(ladders)]["subject"]
            parts = [pivot("", recovery, columns, heading=BLOCK, strong=[subject])]
            parts.append(pivot("", own.pick(metric="cost of none, nats"), nats, "metric"))
            out.append(stack(f"{title}: recovery by block size ({counted})", *parts))
    return out


def plot(table: Table, subject: str, path: Path) -> None:
    """A panel per span, a line per carrier."""
    recovery = table.pick(metric="recovery", domain=None)
    names, sizes = recovery.names("carrier"), recovery.names("run")
    colours = colours_of(names, subject)
    with picture(path, (17, 5.2), columns=len(SPANS)) as grid:
        for axes, (span, title) in zip(grid[0], SPANS.items(), strict=True):
            for place, name in enumerate(names):
                # Each line stands a little to the side, so that no interval hides another.
                beside = 1.02 ** (place - len(names) / 2)
                rows = recovery.pick(carrier=name, span=span)
                line(axes, [(row["run"] * beside, row) for row in rows], color=colours[name], label=name)
            powers(axes, sizes)
            panel(axes, title, "tokens per block (log scale)", "recovery", zero=True)
        legend(grid[0, 0], "right upper")


def options(given: Options) -> None:
    given.runs("folders of finished ladders")
    given.add("--out", type=Path, default=Path("runs/block_sizes"), help="stem of the files")


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """Tables and a picture of finished ladders."""
    ladders = by_size([read_ladder(Path(folder)) for folder in args.runs])
    table, subject = long_table(ladders), next(iter(ladders.values()))["subject"]
    usable(args.out.parent)
    draw = partial(plot, table, subject)
    yield args.out, Report("Block sizes", table, sheets(ladders, table), LEGEND, about={"ladders": ladders}, draw=draw)


main = command("block_sizes", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
