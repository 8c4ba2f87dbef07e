"""Which settings are best: a table and a picture of any set of runs.

    python -m megactx.evaluation.leaderboard runs/sweep_heads_depths

Runs are ranked by recovery over all h. Runs that differ in their seed only are one row. A difference to the best row
counts only where its paired bootstrap interval excludes zero; else the two are tied. What makes rows incomparable
(other evaluated blocks, horizon, base or training tokens) is said.
"""

import argparse
import csv
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from .bootstrap import Interval, difference_intervals, verdict
from .files import replacing
from .metrics import BODY
from .runs import Run, find_runs, in_words, labels, same_but_seed
from .scores import BlockScores

SPANS = {"recovery": ("all", 0), "recovery_body": ("body", BODY)}  # column -> (span of the report, first offset)
FIGURES = ("dnll", "kl", "substitutability")
WIDTH = 140  # columns, where the output is no terminal
LEGEND = (
    "recovery = 1 - sum dNLL / sum dNLL_drop; brackets: 95 %, paired bootstrap over documents; with several seeds: "
    "mean ± std over seeds. dNLL, KL in nats per token; subst. = blocks with dNLL < 1.0. tokens: those trained on, "
    "steps x accumulate x batch x spans x H x devices, the predictions under the loss. The best of many rows is "
    "flattered by the choice."
)


@dataclass
class Row:
    """Runs of the same settings, one per seed. Intervals are those of one run, or the mean and its spread."""

    runs: list[Run]
    label: dict
    recovery: dict[str, Interval]  # NaN as low and high where there are several seeds
    spread: dict[str, float]  # standard deviation over seeds; NaN where there is one
    figures: dict[str, float]
    flops: float  # per block
    rank: int = 0
    to_best: dict[str, Interval] | None = None  # None where the scores or the blocks do not allow it

    @property
    def name(self) -> str:
        return in_words(self.label) or self.runs[0].folder.name

    def verdict(self, span: str) -> str:
        """``best``, ``tie``, ``below``, ``above``; empty where it cannot be told."""
        if self.rank == 1:
            return "best"
        told = verdict(self.to_best[span]) if self.to_best else "undefined"
        return {"within the interval": "tie", "undefined": ""}.get(told, told)


@dataclass
class Board:
    """The rows, best first; ``notes`` a reader must know; runs without a result."""

    rows: list[Row]
    notes: list[str]
    missing: list[Run]


def build(folders) -> Board:
    """Read every run below the folders.

    Raises:
        ValueError: a folder does not exist, or there is no run in any of them.
    """
    runs = find_runs(folders)
    having = [run for run in runs if run.report]
    groups = same_but_seed(having)
    told, along = labels([group[0] for group in groups])
    rows = [_row(group, label) for group, label in zip(groups, told, strict=True)]
    rows.sort(key=lambda row: math.inf if math.isnan(point := row.recovery["recovery"].point) else -point)
    for rank, row in enumerate(rows, start=1):
        row.rank = rank
    notes = _incomparable(rows)
    if len(rows) > 1:
        _compare(rows)
    if along:
        notes.append("; ".join(along) + ".")
    return Board(rows, notes, [run for run in runs if not run.report])


def _row(runs: list[Run], label: dict) -> Row:
    reports = [run.report for run in runs]
    figures, recovery, spread = {}, {}, {}
    for name in FIGURES:
        figures[name] = mean(_float(_own(report, "rows").get(name)) for report in reports)
    for name, (span, _) in SPANS.items():
        intervals = [Interval(*map(_float, _own(report, "recovery")[span].values())) for report in reports]
        points = [interval.point for interval in intervals]
        several = len(runs) > 1
        recovery[name] = Interval(mean(points), math.nan, math.nan) if several else intervals[0]
        spread[name] = stdev(points) if several else math.nan
    flops = reports[0]["flops_per_block"][reports[0]["subject"]]
    return Row(runs, label, recovery, spread, figures, flops)


def _own(report: dict, part: str) -> dict:
    return report["groups"]["overall"][part][report["subject"]]


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _base(row: Row) -> str:
    return row.runs[0].config["base"]["name"]


def _incomparable(rows: list[Row]) -> list[str]:
    """One line for each condition of a fair comparison that the runs do not share."""
    runs = [run for row in rows for run in row.runs]
    conditions = {
        "the evaluated blocks (hash)": lambda run: run.report["block_hash"],
        "the horizon": lambda run: run.report["horizon"],
        "the base": lambda run: run.config["base"]["name"],
        "training tokens": lambda run: run.training_tokens,
    }
    notes = []
    for what, of in conditions.items():
        counts = Counter(of(run) for run in runs)
        if len(counts) > 1:
            told = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            words = [f"{value:,}" if isinstance(value, int) else value for value, _ in told]
            parts = ", ".join(f"{word} ({n} run{'s' * (n > 1)})" for word, (_, n) in zip(words, told, strict=True))
            notes.append(f"NOT COMPARABLE: the runs differ in {what}: {parts}.")
    return notes


def _compare(rows: list[Row]) -> None:
    """Fill ``to_best`` of the rows whose scores are on the blocks and the base of the best row."""
    best = _relative(rows[0])
    if best is None:
        return
    carriers = {}
    for index, row in enumerate(rows[1:], start=1):
        other = _relative(row) if _base(row) == _base(rows[0]) else None
        if other is not None and other[0].block_hash() == best[0].block_hash():
            carriers[str(index)] = best[0].full + other[1]
    if not carriers:
        return
    scores = best[0]
    scores.carriers = carriers | {"best": scores.full + best[1]}
    # Recovery of the best minus that of a row; the table shows the row minus the best.
    found = {name: difference_intervals(scores, "best", list(carriers), first) for name, (_, first) in SPANS.items()}
    for index in carriers:
        rows[int(index)].to_best = {
            name: Interval(-spans[index].point, -spans[index].high, -spans[index].low) for name, spans in found.items()
        }


def _relative(row: Row):
    """Scores of a row's first run and its dNLL [M, H], mean over seeds, blocks in one fixed order."""
    total = None
    for run in row.runs:
        if not (run.folder / "scores.safetensors").exists():
            return None
        scores = BlockScores.load(run.folder / "scores")
        places = list(zip(scores.document.tolist(), scores.start.tolist(), strict=True))
        order = sorted(range(len(scores)), key=places.__getitem__)
        dnll = (scores.carriers[run.report["subject"]].double() - scores.full.double())[order]
        if total is None:
            first = BlockScores(
                full=scores.full[order].double(),
                drop=scores.drop[order].double(),
                carriers={},
                domain=[scores.domain[index] for index in order],
                document=scores.document[order],
                start=scores.start[order],
            )
            total = dnll
        elif scores.block_hash() != first.block_hash():
            return None
        else:
            total = total + dnll
    return first, total / len(row.runs)


def tables(board: Board) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of each table, as text."""
    out = []
    if board.rows:
        header = [
            "#",
            "run",
            "recovery, all h",
            "h >= 4",
            "vs best",
            "dNLL",
            "KL",
            "subst.",
            "MFLOP",
            "params",
            "tokens",
        ]
        body = []
        for row in board.rows:
            figures = row.figures
            body.append(
                [
                    str(row.rank),
                    row.name,
                    *[_cell(row, name) for name in SPANS],
                    row.verdict("recovery"),
                    *[f"{figures[name]:.3f}" for name in ("dnll", "kl")],
                    f"{figures['substitutability']:.0%}",
                    f"{row.flops / 1e6:.3g}",
                    _count(row.runs[0].parameters),
                    _count(row.runs[0].training_tokens),
                ]
            )
        count = sum(len(row.runs) for row in board.rows)
        hashes = {run.report["block_hash"] for row in board.rows for run in row.runs}
        first = board.rows[0].runs[0].report
        blocks = f"{first['blocks']:,} blocks of {first['documents']:,} documents, H = {first['horizon']}, hash"
        title = f"leaderboard: {count} runs" + (f", {blocks} {first['block_hash']}" if len(hashes) == 1 else "")
        out.append((title, header, body))
    compared = [row for row in board.rows if row.to_best]
    if compared:
        header = ["#", "run", "all h", "", "h >= 4", ""]
        body = [
            [
                str(row.rank),
                row.name,
                *[text for name in SPANS for text in (_interval(row.to_best[name], "+"), row.verdict(name))],
            ]
            for row in compared
        ]
        out.append(("recovery minus that of the best row, on the same blocks", header, body))
    if board.missing:
        body = [[str(run.folder), run.reason] for run in board.missing]
        out.append((f"without a result: {len(body)} runs", ["run", "reason"], body))
    return out


def _count(number: int | None) -> str:
    """1234567 -> 1.23M."""
    if number is None:
        return "-"
    for letter, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def _cell(row: Row, name: str) -> str:
    if len(row.runs) > 1:
        return f"{row.recovery[name].point:.3f} ± {row.spread[name]:.3f} ({len(row.runs)} seeds)"
    return _interval(row.recovery[name])


def _interval(interval: Interval, sign: str = "") -> str:
    if math.isnan(interval.point):
        return "undefined"
    known = not math.isnan(interval.low)
    return f"{interval.point:{sign}.3f}" + (f" [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]" if known else "")


def show(board: Board, console=None) -> None:
    """Print the tables, with rich."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for title, header, body in tables(board):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
        for name in header:
            words = name in ("run", "reason", "vs best", "")
            least = 30 if name == "run" else None
            table.add_column(name, justify="left" if words else "right", no_wrap=not words, min_width=least)
        for cells in body:
            table.add_row(*map(escape, cells), style="bold" if cells[0] == "1" else None)
        console.print(f"\n[bold]{escape(title)}[/bold]", highlight=False)
        console.print(table)
    if board.rows:
        console.print(LEGEND, style="dim", highlight=False)
    for note in board.notes:
        console.print(f"! {note}", style="yellow", highlight=False, markup=False)


def write(board: Board, folder: str | Path) -> None:
    """Write ``leaderboard.md``, ``leaderboard.csv`` and ``leaderboard.png``."""
    from .leaderboard_plot import plot

    folder = Path(folder)
    with replacing(folder / "leaderboard.md") as part:
        part.write_text(_markdown(board))
    with replacing(folder / "leaderboard.csv") as part, part.open("w", newline="") as file:
        lines = [_record(row) for row in board.rows]
        lines += [{"folder": str(run.folder), "reason": run.reason} for run in board.missing]
        columns = list(dict.fromkeys([name for line in lines for name in line]))
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)
    plot(board.rows, folder / "leaderboard.png")


def _markdown(board: Board) -> str:
    def line(cells):
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    out = ["# Leaderboard", ""]
    out += [f"- {note}" for note in board.notes] + [""] * bool(board.notes)
    for title, header, body in tables(board):
        out += [f"## {title}", "", line(header), line(["---"] * len(header)), *map(line, body), ""]
    return "\n".join([*out, LEGEND]) + "\n"


def _record(row: Row) -> dict:
    out = {"rank": row.rank, "run": row.name, "seeds": " ".join(str(run.seed) for run in row.runs)}
    for name in SPANS:
        out |= {name: row.recovery[name].point, f"{name}_low": row.recovery[name].low}
        out |= {f"{name}_high": row.recovery[name].high, f"{name}_std": row.spread[name]}
    out |= row.figures
    first = row.runs[0]
    out |= {"flops_per_block": row.flops, "parameters": first.parameters, "training_tokens": first.training_tokens}
    out |= {"horizon": first.report["horizon"], "block_hash": first.report["block_hash"]}
    out |= {"base": _base(row)}
    for name in SPANS:
        if row.to_best:
            point, low, high = row.to_best[name]
            out |= {f"{name}_to_best": point, f"{name}_to_best_low": low, f"{name}_to_best_high": high}
        out[f"{name}_verdict"] = row.verdict(name)
    return out | {"folder": " ".join(str(run.folder) for run in row.runs), "reason": ""}


def report(folders, out: str | Path) -> Board:
    """Build, print and write to ``out``; where no run has a result, nothing is printed or written."""
    board = build(folders)
    if board.rows:
        show(board)
        write(board, out)
        print(f"Leaderboard: {Path(out) / 'leaderboard.md'}, .csv and .png")
    return board


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> 0, 2 for a mistake, 3 where no run has a result."""
    parser = argparse.ArgumentParser(
        prog="python -m megactx.evaluation.leaderboard", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="run folders, or folders of them")
    parser.add_argument("--out", metavar="FOLDER", help="where the files go; without it the first FOLDER")
    asked = parser.parse_args(arguments)
    try:
        board = report(asked.folders, asked.out or asked.folders[0])
    except ValueError as error:
        print(f"megactx: {error}", file=sys.stderr)
        return 2
    if not board.rows:
        show(board)
    return 0 if board.rows else 3


if __name__ == "__main__":
    sys.exit(main())
