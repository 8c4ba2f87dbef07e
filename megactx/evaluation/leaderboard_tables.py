"""A leaderboard as tables: for a terminal, as Markdown, as CSV. ``board`` and ``row`` are those of ``leaderboard``."""

import csv
import math
from pathlib import Path

from megactx.framework.files import replacing

from .bootstrap import Interval
from .leaderboard_plot import plot
from .metrics import BODY
from .sheets import Sheet, console_of, markdown_sheet, print_sheet

SPANS = {"recovery": ("all", 0), "recovery_body": ("body", BODY)}  # column -> (span of the report, first offset)
WIDTH = 140  # columns, where the output is no terminal
LEGEND = (
    "recovery = 1 - sum dNLL / sum dNLL_drop; brackets: 95 %, paired bootstrap over documents; with several seeds: "
    "mean ± std over seeds. dNLL, KL in nats per token; subst. = blocks with dNLL < 1.0. tokens: those trained on, "
    "steps x accumulate x batch x spans x H x devices, the predictions under the loss. The best of many rows is "
    "flattered by the choice."
)


def tables(board) -> list[Sheet]:
    """Rows in order, differences to the best one, and runs without a result."""
    out = []
    if board.rows:
        header = ["#", "run", "recovery, all h", "h >= 4", "vs best", "dNLL", "KL", "subst.", "MFLOP"]
        header += ["params", "tokens"]
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
        title = f"leaderboard: {in_runs(count)}" + (f", {blocks} {first['block_hash']}" if len(hashes) == 1 else "")
        strong = tuple(index for index, row in enumerate(board.rows) if row.rank == 1)
        out.append(Sheet(title, header, body, strong))
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
        out.append(Sheet("recovery minus that of the best row, on the same blocks", header, body))
    if board.missing:
        body = [[str(run.folder), run.reason] for run in board.missing]
        out.append(Sheet(f"without a result: {in_runs(len(body))}", ["run", "reason"], body))
    return out


def in_runs(number: int) -> str:
    """``1 run``, ``2 runs``."""
    return "1 run" if number == 1 else f"{number} runs"


def _count(number: int | None) -> str:
    """1234567 -> 1.23M."""
    if number is None:
        return "-"
    for letter, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def _cell(row, name: str) -> str:
    if len(row.runs) > 1:
        return f"{row.recovery[name].point:.3f} ± {row.spread[name]:.3f} ({len(row.runs)} seeds)"
    return _interval(row.recovery[name])


def _interval(interval: Interval, sign: str = "") -> str:
    if math.isnan(interval.point):
        return "undefined"
    known = not math.isnan(interval.low)
    return f"{interval.point:{sign}.3f}" + (f" [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]" if known else "")


def show(board, console=None) -> None:
    """Print the tables, with rich."""
    console = console_of(console, WIDTH)
    for sheet in tables(board):
        print_sheet(sheet, console, WIDTH)
    if board.rows:
        console.print(LEGEND, style="dim", highlight=False)
    for note in board.notes:
        console.print(f"! {note}", style="yellow", highlight=False, markup=False)


def write(board, folder: str | Path) -> None:
    """Write ``leaderboard.md``, ``leaderboard.csv`` and ``leaderboard.png``."""
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


def _markdown(board) -> str:
    out = ["# Leaderboard", ""]
    out += [f"- {note}" for note in board.notes] + [""] * bool(board.notes)
    return "\n".join([*out, *map(markdown_sheet, tables(board)), LEGEND]) + "\n"


def _record(row) -> dict:
    out = {"rank": row.rank, "run": row.name, "seeds": " ".join(str(run.seed) for run in row.runs)}
    for name in SPANS:
        out |= {name: row.recovery[name].point, f"{name}_low": row.recovery[name].low}
        out |= {f"{name}_high": row.recovery[name].high, f"{name}_std": row.spread[name]}
    out |= row.figures
    first = row.runs[0]
    out |= {"flops_per_block": row.flops, "parameters": first.parameters, "training_tokens": first.training_tokens}
    out |= {"horizon": first.report["horizon"], "block_hash": first.report["block_hash"]}
    out |= {"base": row.base}
    for name in SPANS:
        if row.to_best:
            point, low, high = row.to_best[name]
            out |= {f"{name}_to_best": point, f"{name}_to_best_low": low, f"{name}_to_best_high": high}
        out[f"{name}_verdict"] = row.verdict(name)
    return out | {"folder": " ".join(str(run.folder) for run in row.runs), "reason": ""}
