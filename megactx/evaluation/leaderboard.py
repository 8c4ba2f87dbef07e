"""Which settings are best: a table and a picture of any set of runs.

    python -m megactx.evaluation.leaderboard runs/sweep_heads_depths

Runs are ranked by recovery over all h. Runs that differ in their seed only are one row. A difference to the best row
counts only where its paired bootstrap interval excludes zero; else the two are tied. What makes rows incomparable
(other evaluated blocks, horizon, base or training tokens) is said.
"""

import argparse
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megactx.framework import command_line

from .bootstrap import Interval, difference_intervals, verdict
from .leaderboard_tables import SPANS, in_runs, show, write
from .runs import Run, find_runs, in_words, labels, same_but_seed
from .scores import BlockScores

FIGURES = ("dnll", "kl", "substitutability")


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

    @property
    def base(self) -> str:
        return self.runs[0].config["base"]["name"]

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
        figures[name] = float(np.mean([_float(_own(report, "rows").get(name)) for report in reports]))
    for name, (span, _) in SPANS.items():
        told = [_own(report, "recovery")[span] for report in reports]
        points = [_float(interval["point"]) for interval in told]
        recovery[name] = Interval(float(np.mean(points)), math.nan, math.nan)
        spread[name] = float(np.std(points, ddof=1)) if len(runs) > 1 else math.nan
        if len(runs) == 1:
            recovery[name] = Interval(*[_float(told[0][end]) for end in Interval._fields])
    flops = reports[0]["flops_per_block"][reports[0]["subject"]]
    return Row(runs, label, recovery, spread, figures, flops)


def _own(report: dict, part: str) -> dict:
    return report["groups"]["overall"][part][report["subject"]]


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)


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
            parts = ", ".join(f"{word} ({in_runs(n)})" for word, (_, n) in zip(words, told, strict=True))
            notes.append(f"NOT COMPARABLE: the runs differ in {what}: {parts}.")
    return notes


def _compare(rows: list[Row]) -> None:
    """Fill ``to_best`` of the rows whose scores are on the blocks and the base of the best row."""
    best = _relative(rows[0])
    if best is None:
        return
    carriers = {}
    for index, row in enumerate(rows[1:], start=1):
        other = _relative(row) if row.base == rows[0].base else None
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


def report(folders, out: str | Path) -> Board:
    """Build, print and write to ``out``; where no run has a result, nothing is printed or written."""
    board = build(folders)
    if board.rows:
        show(board)
        write(board, out)
        print(f"Leaderboard: {Path(out) / 'leaderboard.md'}, .csv and .png")
    return board


def command(asked: argparse.Namespace) -> int:
    """-> 3 where no run has a result."""
    board = report(asked.folders, asked.out or asked.folders[0])
    if not board.rows:
        show(board)
    return 0 if board.rows else 3


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m megactx.evaluation.leaderboard", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="run folders, or folders of them")
    parser.add_argument("--out", metavar="FOLDER", help="where the files go; without it the first FOLDER")
    return command_line.run(command, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
