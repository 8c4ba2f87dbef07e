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
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megactx.framework import command_line

from .bootstrap import Interval, difference_intervals, reverse, verdict
from .metrics import BODY
from .pictures import COLOURS, legend, named, panel, picture, room_above, side_by_side
from .runs import Run, find_runs, in_words, labels, same_but_seed
from .scores import BlockScores
from .summary import DROPPED
from .table import OVERALL, Report, Sheet, Table, cell, defined, pivot

SPANS = {"all": (0, "recovery, all h"), "body": (BODY, "recovery, h >= 4")}  # span -> first offset, title
FIGURES = {"dnll": "dNLL", "kl": "KL", "substitutability": "subst."}
WIDTH = 140  # columns, where the output is no terminal
LEGEND = (
    "recovery = 1 - sum dNLL / sum dNLL_drop; brackets: 95 %, paired bootstrap over documents; with several seeds: "
    "mean ± std over seeds. dNLL, KL in nats per token; subst. = blocks with dNLL < 1.0. tokens: those trained on, "
    "steps x accumulate x batch x spans x H x devices, the predictions under the loss. The best of many rows is "
    "flattered by the choice."
)
MARKERS = "osD^vP*X"
LAST = "last token"


@dataclass
class Row:
    """Runs of the same settings, one per seed."""

    runs: list[Run]
    label: dict
    recovery: dict[str, dict]  # span -> point with the ends of one run, or mean and std over several seeds
    figures: dict[str, float]
    flops: float  # per block
    rank: int = 0
    to_best: dict[str, Interval] | None = None  # by span; None where the scores or the blocks do not allow it

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

    def about(self) -> dict:
        """What a file says of it beside its figures."""
        report, runs = self.runs[0].report, self.runs
        out = {"run": self.name, "seeds": [run.seed for run in runs], "folders": [str(run.folder) for run in runs]}
        out |= {"base": self.base, "horizon": report["horizon"], "block_hash": report["block_hash"]}
        return out | {"verdict": {span: self.verdict(span) for span in SPANS}}


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
    rows.sort(key=lambda row: -row.recovery["all"]["point"] if defined(row.recovery["all"]) else math.inf)
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
    figures = {name: float(np.mean([_float(_own(report, "rows").get(name)) for report in reports])) for name in FIGURES}
    recovery = {}
    for span in SPANS:
        told = [_own(report, "recovery")[span] for report in reports]
        points = [_float(interval["point"]) for interval in told]
        recovery[span] = (
            {"point": float(np.mean(points)), "std": float(np.std(points, ddof=1))} if runs[1:] else told[0]
        )
    return Row(runs, label, recovery, figures, reports[0]["flops_per_block"][reports[0]["subject"]])


def _own(report: dict, part: str) -> dict:
    return report["groups"][OVERALL][part][report["subject"]]


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
            parts = ", ".join(f"{word} ({_in_runs(n)})" for word, (_, n) in zip(words, told, strict=True))
            notes.append(f"NOT COMPARABLE: the runs differ in {what}: {parts}.")
    return notes


def _compare(rows: list[Row]) -> None:
    """Fill ``to_best`` of the rows whose scores are on the blocks and the base of the best row."""
    if (best := _relative(rows[0])) is None:
        return
    carriers, (scores, own) = {}, best
    for index, row in enumerate(rows[1:], start=1):
        other = _relative(row) if row.base == rows[0].base else None
        if other is not None and other[0].block_hash() == scores.block_hash():
            carriers[str(index)] = scores.full + other[1]
    scores.carriers = carriers | {"best": scores.full + own}
    # Recovery of the best minus that of a row; the table shows the row minus the best.
    found = {span: difference_intervals(scores, "best", list(carriers), first) for span, (first, _) in SPANS.items()}
    for index in carriers:
        rows[int(index)].to_best = {span: reverse(differences[index]) for span, differences in found.items()}


def _relative(row: Row) -> tuple[BlockScores, object] | None:
    """Scores of a row's first run and its dNLL [M, H], mean over seeds, blocks in one fixed order."""
    total, first = 0, None
    for run in row.runs:
        if not (run.folder / "scores.safetensors").exists():
            return None
        scores = BlockScores.load(run.folder / "scores")
        places = list(zip(scores.document.tolist(), scores.start.tolist(), strict=True))
        scores = scores.take(sorted(range(len(scores)), key=places.__getitem__))
        if first is None:
            first = replace(scores, full=scores.full.double(), drop=scores.drop.double(), carriers={}, kl={}, agree={})
        elif scores.block_hash() != first.block_hash():
            return None
        total = total + (scores.carriers[run.report["subject"]].double() - scores.full.double())
    return first, total / len(row.runs)


def report_of(board: Board) -> Report:
    """Rows in order, differences to the best one, and runs without a result."""
    rows, table, sheets = {row.name: row for row in board.rows}, Table(), []
    for row in board.rows:
        first, about = row.runs[0], {"run": row.name, "n": len(row.runs)}
        table.add("rank", row.rank, **about)
        table.add_all({"recovery": row.recovery, "to best": row.to_best or {}}, "metric", "span", **about)
        sizes = {"flops_per_block": row.flops, "parameters": first.parameters, "training_tokens": first.training_tokens}
        table.add_all(row.figures | sizes, "metric", **about)
    for run in board.missing:
        table.add(f"no result: {run.reason}", None, run=str(run.folder))
    if rows:
        columns = [("run", "rank", lambda row: row["run"])]
        columns += [(title, {"metric": "recovery", "span": span}, _seeds) for span, (_, title) in SPANS.items()]
        columns.append(("vs best", "rank", lambda row: rows[row["run"]].verdict("all")))
        columns += [(title, metric, ".0%" if title == "subst." else ".3f") for metric, title in FIGURES.items()]
        columns += [("MFLOP", "flops_per_block", lambda row: f"{row['point'] / 1e6:.3g}")]
        columns += [("params", "parameters", _count), ("tokens", "training_tokens", _count)]
        hashes = {run.report["block_hash"] for row in board.rows for run in row.runs}
        first = board.rows[0].runs[0].report
        blocks = f"{first['blocks']:,} blocks of {first['documents']:,} documents, H = {first['horizon']}, hash"
        title = f"leaderboard: {_in_runs(sum(len(row.runs) for row in board.rows))}"
        title += f", {blocks} {first['block_hash']}" if len(hashes) == 1 else ""
        best = [row.name for row in board.rows if row.rank == 1]
        sheets.append(pivot(title, table, columns, "run", "#", rows, best, lambda name: str(rows[name].rank)))
    if compared := [row.name for row in board.rows if row.to_best]:
        columns = [("run", "rank", lambda row: row["run"])]
        for span, (_, title) in SPANS.items():
            columns.append((title, {"metric": "to best", "span": span}, "+.3f"))
            columns.append(("", "rank", lambda row, span=span: rows[row["run"]].verdict(span)))
        title = "recovery minus that of the best row, on the same blocks"
        sheets.append(pivot(title, table, columns, "run", "#", compared, label=lambda name: str(rows[name].rank)))
    if board.missing:
        body = [[str(run.folder), run.reason] for run in board.missing]
        sheets.append(Sheet(f"without a result: {_in_runs(len(body))}", ["run", "reason"], body))
    about = {"rows": [row.about() for row in board.rows]}
    about["missing"] = {str(run.folder): run.reason for run in board.missing}
    return Report("Leaderboard", table, sheets, LEGEND, board.notes, about, lambda path: plot(board.rows, path), WIDTH)


def _in_runs(number: int) -> str:
    """``1 run``, ``2 runs``."""
    return "1 run" if number == 1 else f"{number} runs"


def _seeds(row: dict) -> str:
    several = f" ({row['n']} seeds)" if row["n"] > 1 else ""
    return cell(row, ".3f") + several


def _count(row: dict) -> str:
    """1234567 -> 1.23M."""
    number = row["point"]
    for letter, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number is not None and number >= size:
            return f"{number / size:.3g}{letter}"
    return "-" if number is None else str(number)


def plot(rows: list[Row], path: Path) -> None:
    """Recovery against FLOPs per block, one point per row: colour by pooling, marker by head.

    Bars are the 95 % bootstrap interval of one run, or the standard deviation over seeds. The controls' lines are
    of the best row's blocks, where a report has them.
    """
    poolings, heads = ({part(row) for row in rows} for part in (_pooling, _head))
    colours = dict(zip(sorted(poolings), COLOURS * 9, strict=False))
    markers = dict(zip(sorted(heads), MARKERS * 9, strict=False))
    order = sorted(rows, key=lambda row: (_pooling(row), _head(row)))
    with picture(path, (15, 13), rows=2) as grid:
        for axes, (span, (_, title)) in zip(grid[:, 0], SPANS.items(), strict=True):
            for row, x in zip(order, side_by_side([row.flops for row in order]), strict=True):
                rest = [f"{key}={value}" for key, value in row.label.items() if key not in ("pooling", "head", "type")]
                style = {"color": colours[_pooling(row)], "marker": markers[_head(row)]}
                named(axes, x, row.recovery[span], f"#{row.rank} {' '.join(rest)}".rstrip(), **style)
            axes.set_xscale("log")
            _controls(axes, rows, span)
            room_above(axes)
            axes.margins(x=0.05)
            panel(axes, title, "FLOPs of the GistNet per block (log scale; nearly equal ones side by side)", "recovery")
        shown = [(pooling, {"color": colour, "marker": "o"}) for pooling, colour in colours.items()]
        shown += [(f"head {head}", {"color": "#666666", "marker": marker}) for head, marker in markers.items()]
        for label, style in shown:
            grid[0, 0].plot([], [], linestyle="", label=label, **style)
        legend(grid[0, 0], "lower center", ncols=8)


def _controls(axes, rows: list[Row], span: str) -> None:
    """Lines where dropping the block stands, and the last token, in the first report that has measured it."""
    blocks = rows[0].runs[0].report["block_hash"]
    reports = [row.runs[0].report for row in rows if row.runs[0].report["block_hash"] == blocks]
    told = [report["groups"][OVERALL]["recovery"].get(LAST) for report in reports]
    last = next((recovery[span]["point"] for recovery in told if recovery), None)
    for name, level in ((DROPPED, 0), (LAST, last)):
        if level is not None:
            axes.axhline(level, color="black", linestyle="--" if name == DROPPED else ":", linewidth=1.2)
            axes.annotate(name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9)


def _pooling(row: Row) -> str:
    settings = row.runs[0].settings
    return f"pooling {settings['gistnet.pooling']}" if "gistnet.pooling" in settings else "no backbone"


def _head(row: Row) -> str:
    return str(row.runs[0].settings.get("gistnet.head", ""))


def report(folders, out: str | Path) -> Board:
    """Build, print and write to ``out``; where no run has a result, nothing is printed or written."""
    board = build(folders)
    if board.rows:
        made = report_of(board)
        made.show()
        print(made.write(Path(out) / "leaderboard"))
    return board


def command(args: argparse.Namespace) -> int:
    """-> 3 where no run has a result."""
    board = report(args.folders, args.out or args.folders[0])
    if not board.rows:
        report_of(board).show()
    return 0 if board.rows else 3


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser("python -m megactx.evaluation.leaderboard", description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="run folders, or folders of them")
    parser.add_argument("--out", metavar="FOLDER", help="where the files go; without it the first FOLDER")
    return command_line.run(command, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
