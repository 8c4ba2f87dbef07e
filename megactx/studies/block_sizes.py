"""What a block may be: finished ladders that differ in their block size, in one table and one picture.

    python -m megactx.studies.ladder block_size=8 folder=runs/k8 ...       one ladder per size, of the same text
    python -m megactx.studies.block_sizes runs/k8 runs/k16 runs/k32        recovery by block size

Blocks of other sizes are other blocks, so what dropping one costs stands beside what its carriers recover of it. Runs
of the same size, such as seeds, are combined.
"""

import argparse
import sys
from pathlib import Path

from megactx.evaluation.sheets import Sheet
from megactx.framework.command_line import run

from .block_sizes_plot import MODES, plot
from .ladder import read_ladder
from .ladder_report import combine
from .tables import interval, show, usable, write

NOTES = [
    "recovery = 1 - sum dNLL / sum dNLL_drop. Brackets: 95 %, bootstrap over documents; with several runs of a size ±"
    " is their standard deviation.",
    "cost of none: dNLL in nats per token with the block dropped, or all blocks of the history.",
]


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
    if not shared(ladders):
        raise ValueError("block_sizes: the runs have no carrier in common")
    return ladders


def shared(ladders: dict[int, dict]) -> list[str]:
    """Carriers that every size has, best at the smallest first."""
    first = next(iter(ladders.values()))["carriers"]
    names = [name for name in first if all(name in ladder["carriers"] for ladder in ladders.values())]
    points = {name: (first[name].get("recovery") or {}).get("point") for name in names}
    return sorted(names, key=lambda name: (points[name] is None, -(points[name] or 0)))


def costs(ladder: dict) -> dict[str, float | None]:
    """Mode -> what having nothing costs, in nats per token."""
    dropped = ladder["by_offset"]["dropped"]
    means = {
        name: sum(dropped[first:]) / max(1, len(dropped) - first) for name, first in (("recovery", 1), ("body", 4))
    }
    return means | {"history": ladder.get("cost_of_no_history")}


def sheets(ladders: dict[int, dict]) -> list[Sheet]:
    names, out = shared(ladders), []
    each = {k: f"{run['blocks']:,} blocks of {run['documents']:,} documents" for k, run in ladders.items()}
    alike = f"{each[min(each)]} each" if len({*each.values()}) == 1 else ""
    counted = alike or ", ".join(f"{k}: {text}" for k, text in each.items())
    for mode, title in MODES.items():
        if not any(mode in ladder["carriers"][name] for ladder in ladders.values() for name in names):
            continue
        rows = [[name, *[_cell(ladder["carriers"][name].get(mode)) for ladder in ladders.values()]] for name in names]
        none = [costs(ladder)[mode] for ladder in ladders.values()]
        rows.append(["cost of none, nats", *["-" if cost is None else f"{cost:.3f}" for cost in none]])
        strong = (names.index(ladders[min(ladders)]["subject"]),)
        heading = f"{title}: recovery by block size ({counted})"
        out.append(Sheet(heading, ["in place of the block", *map(str, ladders)], rows, strong))
    return out


def rows_of(ladders: dict[int, dict]) -> list[dict]:
    """A row per carrier and size."""
    out = []
    for size, ladder in ladders.items():
        for name in shared(ladders):
            carrier = ladder["carriers"][name]
            row = {"carrier": name, "block_size": size, "seeds": ladder["seeds"], "bytes": carrier["bytes_per_token"]}
            for mode in MODES:
                value = carrier.get(mode) or {}
                row |= {mode: value.get("point"), f"{mode}_low": value.get("low"), f"{mode}_high": value.get("high")}
            out.append(row)
    return out


def _cell(value: dict | None) -> str:
    return interval(value) + (f" ± {value['std']:.3f}" if value and "std" in value else "")


def command(asked: argparse.Namespace) -> None:
    """Tables and a picture of finished ladders."""
    ladders = by_size([read_ladder(Path(folder)) for folder in asked.runs])
    tables = sheets(ladders)
    show(tables, NOTES)
    usable(asked.out.parent)
    write(asked.out, "Block sizes", tables, NOTES, rows_of(ladders), {str(k): run for k, run in ladders.items()})
    plot(asked.out.with_name(f"{asked.out.name}.png"), ladders)
    print(f"Block sizes: {asked.out}.md, .csv, .json and .png")


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.studies.block_sizes", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished ladders")
    parser.add_argument("--out", type=Path, default=Path("runs/block_sizes"), help="default runs/block_sizes")
    return run(command, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
