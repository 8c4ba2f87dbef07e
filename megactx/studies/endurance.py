"""One session through a million tokens of real text: time, memory and NLL along the way, with a picture.

    python -m megactx.studies.endurance                                         the held-out embedded text, in minutes
    python -m megactx.studies.endurance --path TEXTS --tokens 1000000           in hours, gone on with after a stop

Documents follow one another in a random order. Every token is read as if it had been decoded: scored by the base LM
behind the window, and after every block of 32 gist, room, LensNet, allocator and what changed in the window read again.
So nothing is left out that a session does in its life but the sampling itself.

    ms        CPU time of this process per token, of one thread; on a GPU the time that has gone by
    resident  memory of the process; working: keys, values and what they were computed from
    tree      tokens and gists, which grow; formula: what they must take, by the count of tokens and the widths alone
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
import psutil
import torch
from torch import Tensor

from megactx.apps.command_line import add_models, controller_of, observers_of, session_of
from megactx.apps.ingest import SaveClock
from megactx.data.documents import VALIDATION, tokenised
from megactx.data.embedded import Embedded
from megactx.data.files import Files
from megactx.data.tokenizer import TextEncoder
from megactx.evaluation.pictures import colours_of, legend, line, panel, picture
from megactx.evaluation.table import Report, Sheet, Table, cell, pivot
from megactx.framework.bar import bar
from megactx.runtime import Refocused, Session

from .length_policies import clock, telemetry
from .study import Options, command

MIB = 2**20
ABOUT, HOW = "endurance", "endurance_settings"  # what a saved session knows of its study
SHARES = {"swap": "swap", "reuse": "reuse", "used": "utilisation"}  # columns of the table
SAVE_EVERY = 240.0  # seconds; what a kill costs at most


def text_of(tokenizer, path: str | None, tokens: int, seed: int) -> Tensor:
    """Documents in a random order, cut at ``tokens``: ids [T].

    Args:
        path: files, see ``Files``; ``None``: the held-out tenth of the embedded text.

    Raises:
        ValueError: there is not so much text.
    """
    rows = tokenised(Files(path) if path else Embedded(), tokenizer)
    there = np.arange(len(rows)) if path else np.flatnonzero(np.asarray(rows["split"]) == VALIDATION)
    between = TextEncoder(tokenizer)("\n\n", begins=False)
    parts, count = [], 0
    for index in np.random.default_rng(seed).permutation(there).tolist():
        parts.append(torch.tensor(rows[index]["input_ids"] + between))
        count += len(parts[-1])
        if count >= tokens:
            return torch.cat(parts)[:tokens]
    raise ValueError(f"--tokens={tokens} is not allowed: the text has {count:,}; give more with --path")


def formula(tokens: int, block: int, width: int, gist_bytes: int, signals: bool = False) -> int:
    """Bytes of a tree: per token an id of 4, per gist its vector and 17 of what is known of it, per block 5 more.

    Args:
        width: of a gist.
        gist_bytes: of one number of it.
        signals: LensNet has spoken of blocks, or what they are worth was measured: 17 bytes more for each.
    """
    nodes = tokens // block
    total = 4 * tokens + 5 * nodes  # floor 1, how often it was opened 4
    total += 17 * nodes * signals  # worth 4, how often it was scored 4, dNLL 4, NLL 4, measured 1
    while nodes:
        total += nodes * (width * gist_bytes + 17)  # version 4, accesses 4, time 8, protected 1
        nodes //= block
    return total


def carry(session: Session, ids: Tensor, every: int) -> list[dict]:
    """Read what the session has not read yet; -> a row per ``every`` tokens, those of before a stop among them."""
    rows, events, device = session.about.setdefault(ABOUT, []), [], session.stream.device
    observer = events.append
    session.observers.append(observer)
    process, saving = psutil.Process(), SaveClock(session, SAVE_EVERY)
    firsts = list(range(len(rows) * every, len(ids), every))
    terminal = sys.stdout.isatty()
    for first in bar("tokens")(firsts) if terminal else firsts:
        events.clear()
        began = clock(device)
        nll = session.append(ids[first : first + every], score=True)
        ms = 1e3 * (clock(device) - began) / len(nll)
        row = about(session, events, process, nll) | {"ms": ms}
        rows.append(row)
        if not terminal:
            print(
                f"{row['tokens']:>10,} tokens  {row['ms']:6.2f} ms per token  resident {row['resident'] / MIB:7.1f} MiB"
                f"  tree {row['tree'] / MIB:6.2f} MiB  NLL {row['nll']:.3f}",
                flush=True,
            )
        saving.save_when_due()
    session.observers.remove(observer)
    session.save()
    return rows


def about(session: Session, events: list[Refocused], process: psutil.Process, nll: Tensor) -> dict:
    """What is known at the end of a stretch; the tree is compared with its formula."""
    tree, told = session.tree, telemetry(events)
    stored, spent = int(tree.lengths[0]), Counter()
    for event in events:
        spent.update(event.seconds)
    refocusing = sum(seconds for name, seconds in spent.items() if name not in ("decode", "read"))
    return {
        "tokens": session.length,
        "nll": nll.nanmean().item(),
        "refocuses": len(events),
        "refocus_share": refocusing / max(sum(spent.values()), 1e-9),
        "swap": told.get("swap_rate"),
        "reuse": told.get("reuse"),
        "utilisation": told.get("utilisation"),
        "entries": int(session.context.counts[0]) if session.context is not None else 0,
        "resident": process.memory_info().rss,
        "working": session.stream.prefill.bytes(),
        "tree": tree.bytes(),
        "formula": formula(stored, tree.block_size, tree.width, tree.dtype.itemsize if tree.dtype else 0, tree.signals),
    }


def summary(rows: list[dict], full: int) -> dict:
    """The first and the last tenth of what came after the window was full, and how they compare.

    Args:
        full: tokens after which the window is full, or nearly.
    """
    steady = [row for row in rows if row["tokens"] > 2 * full] or rows[-1:]
    size, found = max(1, len(steady) // 10), {}
    values = {name: [row[name] for row in steady] for name in ("ms", "nll")}
    values["memory"] = [row["resident"] - row["tree"] for row in steady]
    for name, each in values.items():
        found |= {f"{name}_first": mean(each[:size]), f"{name}_last": mean(each[-size:])}
    low, high = np.quantile(values["ms"], (0.025, 0.975)).tolist()
    return found | {
        "ms_low": low,
        "ms_high": high,
        "time": found["ms_last"] / found["ms_first"],
        "memory": found["memory_last"] / found["memory_first"],
        "tree": rows[-1]["tree"],
        "exact": all(row["tree"] == row["formula"] for row in rows),
        "refocuses": sum(row["refocuses"] for row in rows),
    }


def table_of(rows: list[dict]) -> Table:
    """Rows of ``carry`` as the long table: a stretch is a span, the tokens at its end."""
    table = Table()
    for row in rows:
        table.add_all({name: value for name, value in row.items() if name != "tokens"}, "metric", span=row["tokens"])
    return table


def sheet(table: Table) -> Sheet:
    """Twenty rows at most, evenly spread."""

    def mib(row: dict) -> str:
        return f"{row['point'] / MIB:.2f}"

    def share(row: dict) -> str:
        return cell(row["point"])

    columns = [("ms", "ms"), ("refocus", "refocus_share"), ("resident MiB", "resident", mib)]
    columns += [(name, name, mib) for name in ("working", "tree", "formula")]
    columns += [(name, metric, share) for name, metric in SHARES.items()] + [("NLL", "nll", ".3f")]
    spans = table.names("span")
    chosen = sorted({round(i) for i in np.linspace(0, len(spans) - 1, min(20, len(spans)))})
    order = [spans[index] for index in chosen]
    return pivot("One session, along the way", table, columns, "span", "tokens", order, label="{:,}".format)


def plot(rows: list[dict], path: Path) -> None:
    """Time, memory and NLL over the tokens of history."""
    columns = {name: [row[name] / MIB for row in rows] for name in ("resident", "tree", "working")}
    held = [resident - tree for resident, tree in zip(columns["resident"], columns["tree"], strict=True)]
    memory = {"resident, without the tree": held, "tree": columns["tree"]}
    memory["keys, values and their inputs"] = columns["working"]
    panels = {"CPU ms per token": {"_": [row["ms"] for row in rows]}, "MiB": memory}  # _: not in the legend
    panels["NLL, nats per token"] = {"_": [row["nll"] for row in rows]}
    tokens = [row["tokens"] / 1e3 for row in rows]
    with picture(path, (16, 4.2), columns=len(panels)) as grid:
        for axes, (label, lines) in zip(grid[0], panels.items(), strict=True):
            for name, colour in colours_of(lines).items():
                points = zip(tokens, lines[name], strict=True)
                line(axes, points, color=colour, label=name, linewidth=1, marker=None)
            axes.set_ylim(bottom=0)
            panel(axes, "", "thousand tokens of history", label)
            legend(axes)


def notes_on(found: dict, tokens: int, budget: int) -> list[str]:
    """What the numbers say."""
    ms = [f"{found[name]:.2f}" for name in ("ms_first", "ms_last", "ms_low", "ms_high")]
    memory = [f"{found[name] / MIB:.1f}" for name in ("memory_first", "memory_last", "tree")]
    return [
        f"{tokens:,} tokens, {found['refocuses']:,} refocuses, a window of {budget:,} entries.",
        f"Time per token, last tenth over first tenth: {found['time']:.2f} ({ms[0]} -> {ms[1]} ms; 95 % of all"
        f" stretches between {ms[2]} and {ms[3]}).",
        f"Memory without the tree, likewise: {found['memory']:.2f} ({memory[0]} -> {memory[1]} MiB).",
        f"The tree takes {memory[2]} MiB, {found['tree'] / tokens:.1f} bytes per token:"
        f" {'exactly its formula, all along' if found['exact'] else 'NOT its formula'}.",
        f"NLL, first and last tenth: {found['nll_first']:.3f}, {found['nll_last']:.3f} (other texts).",
    ]


def options(given: Options) -> None:
    add_models(given.parser, budget=512)
    given.path()
    given.number("tokens", 32_768, "to read")
    given.number("every", 4096, "tokens per row of the table")
    given.number("seed", 0, "of the order of the documents", least=0)
    given.add("--out", default="runs/endurance", help="folder of the session and the results, gone on with")


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """One session through all of the text.

    Raises:
        ValueError: a setting that is not allowed, too little text, or a folder with another study.
    """
    if args.megacontext == "none":
        raise ValueError("--megacontext=none has an end: focus or recency")
    controller, out = controller_of(args, tree=True), Path(args.out)
    ids = text_of(controller.models.base.tokenizer, args.path, args.tokens, args.seed)
    how = {name: getattr(args, name) for name in ("budget", "megacontext", "positions", "every", "seed")}
    how["path"] = args.path and str(Path(args.path).absolute())
    with session_of(out / "session", controller, observers_of(args, controller)) as session:
        if wrong := [f"{k}={v}, not {how[k]}" for k, v in session.about.get(HOW, how).items() if v != how[k]]:
            raise ValueError(f"--out={out}: it holds a study with other settings: {'; '.join(wrong)}")
        count = min(session.length - 1, len(ids))  # the first one is BOS
        if not torch.equal(session.ids(1, 1 + count), ids[:count]):
            raise ValueError(f"--out={out}: it holds a study of other text; name another folder")
        session.about[HOW] = how
        rows = carry(session, ids, args.every)
        device = session.stream.device.type
    found, table = summary(rows, args.budget), table_of(rows)
    notes = notes_on(found, rows[-1]["tokens"], args.budget)
    about = how | {"device": device, "summary": found}
    report = Report("One session that goes on", table, [sheet(table)], "", notes, about, partial(plot, rows))
    yield out / "endurance", report


main = command("endurance", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
