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
import time
from pathlib import Path
from statistics import mean

import numpy as np
import psutil
import torch
from torch import Tensor

from megactx.apps.command_line import add_models, controller_of, observers_of, session_of
from megactx.data.documents import VALIDATION, tokenised
from megactx.data.embedded import Embedded
from megactx.data.files import Files
from megactx.evaluation.sheets import Sheet
from megactx.framework.bar import bar
from megactx.framework.command_line import run
from megactx.framework.files import replacing
from megactx.runtime import Session
from megactx.runtime.text import Encoder

from .tables import show, write
from .trained import quiet

MIB = 2**20
ABOUT, HOW = "endurance", "endurance_settings"  # what a saved session knows of its study
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
    between = Encoder(tokenizer)("\n\n", begins=False)
    parts, count = [], 0
    for index in np.random.default_rng(seed).permutation(there).tolist():
        parts.append(torch.tensor(rows[index]["input_ids"] + between))
        count += len(parts[-1])
        if count >= tokens:
            return torch.cat(parts)[:tokens]
    raise ValueError(f"--tokens={tokens} is not allowed: the text has {count:,}; give more with --path")


def formula(tokens: int, block: int, width: int, gist_bytes: int) -> int:
    """Bytes of a tree: per token an id of 4, per gist its vector and 17 of what is known of it.

    Args:
        width: of a gist.
        gist_bytes: of one number of it.
    """
    total, nodes = 4 * tokens, tokens // block
    while nodes:
        total += nodes * (width * gist_bytes + 17)  # version 4, accesses 4, time 8, protected 1
        nodes //= block
    return total


class Watch:
    """Sums over the refocuses of a stretch of text."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.events, self.seconds = 0, {}
        self.swap, self.reuse, self.full = [], [], []

    def __call__(self, event) -> None:
        self.events += 1
        for name, seconds in event.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.full.append(event.utilisation[0])
        if event.telemetry is not None:
            self.swap.append(float(event.telemetry.swap_rate[0]))
        if event.reuse is not None:
            self.reuse.append(event.reuse)


def carry(session: Session, ids: Tensor, every: int) -> list[dict]:
    """Read what the session has not read yet; -> a row per ``every`` tokens, those of before a stop among them."""
    rows, watch = session.about.setdefault(ABOUT, []), Watch()
    session.observers.append(watch)
    process, saved = psutil.Process(), time.monotonic()
    gpu = session.stream.device.type != "cpu"
    firsts = list(range(len(rows) * every, len(ids), every))
    terminal = sys.stdout.isatty()
    for first in bar("tokens")(firsts) if terminal else firsts:
        watch.clear()
        began = time.perf_counter() if gpu else time.process_time()
        nll = session.append(ids[first : first + every], score=True)
        seconds = (time.perf_counter() if gpu else time.process_time()) - began
        row = about(session, watch, process, nll) | {"ms": 1e3 * seconds / len(nll)}
        rows.append(row)
        if not terminal:
            print(
                f"{row['tokens']:>10,} tokens  {row['ms']:6.2f} ms per token  resident {row['resident'] / MIB:7.1f} MiB"
                f"  tree {row['tree'] / MIB:6.2f} MiB  NLL {row['nll']:.3f}",
                flush=True,
            )
        if time.monotonic() - saved > SAVE_EVERY:
            session.save()
            saved = time.monotonic()
    session.observers.remove(watch)
    session.save()
    return rows


def about(session: Session, watch: Watch, process: psutil.Process, nll: Tensor) -> dict:
    """What is known at the end of a stretch; the tree is compared with its formula."""
    tree, whole = session.tree, sum(watch.seconds.values())
    stored = int(tree.lengths[0])
    return {
        "tokens": session.length,
        "nll": nll.nanmean().item(),
        "refocuses": watch.events,
        "refocus_share": sum(s for name, s in watch.seconds.items() if name not in ("decode", "read"))
        / max(whole, 1e-9),
        "swap": mean(watch.swap) if watch.swap else None,
        "reuse": mean(watch.reuse) if watch.reuse else None,
        "utilisation": mean(watch.full) if watch.full else None,
        "entries": int(session.context.counts[0]) if session.context is not None else 0,
        "resident": process.memory_info().rss,
        "working": session.stream.prefill.bytes(),
        "tree": tree.bytes(),
        "formula": formula(stored, tree.block_size, tree.width, tree.dtype.itemsize if tree.dtype else 0),
    }


def summary(rows: list[dict], full: int) -> dict:
    """The first and the last tenth of what came after the window was full, and how they compare.

    Args:
        full: tokens after which the window is full, or nearly.
    """
    steady = [row for row in rows if row["tokens"] > 2 * full] or rows[-1:]
    size = max(1, len(steady) // 10)
    first, last = steady[:size], steady[-size:]

    def held(row) -> int:
        return row["resident"] - row["tree"]

    ms = np.array([row["ms"] for row in steady])
    return {
        "ms_first": mean(row["ms"] for row in first),
        "ms_last": mean(row["ms"] for row in last),
        "ms_low": float(np.quantile(ms, 0.025)),
        "ms_high": float(np.quantile(ms, 0.975)),
        "time": mean(row["ms"] for row in last) / mean(row["ms"] for row in first),
        "memory_first": mean(map(held, first)),
        "memory_last": mean(map(held, last)),
        "memory": mean(map(held, last)) / mean(map(held, first)),
        "tree": rows[-1]["tree"],
        "exact": all(row["tree"] == row["formula"] for row in rows),
        "nll_first": mean(row["nll"] for row in first),
        "nll_last": mean(row["nll"] for row in last),
        "refocuses": sum(row["refocuses"] for row in rows),
    }


def sheet(rows: list[dict]) -> Sheet:
    """Twenty rows at most, evenly spread."""
    chosen = sorted({round(i) for i in np.linspace(0, len(rows) - 1, min(20, len(rows)))})
    body = []
    for row in (rows[i] for i in chosen):
        share = ["-" if row[name] is None else f"{row[name]:.2f}" for name in ("swap", "reuse", "utilisation")]
        memory = [f"{row[name] / MIB:.2f}" for name in ("resident", "working", "tree", "formula")]
        body.append(
            (
                f"{row['tokens']:,}",
                f"{row['ms']:.2f}",
                f"{row['refocus_share']:.2f}",
                *memory,
                *share,
                f"{row['nll']:.3f}",
            )
        )
    columns = ("tokens", "ms", "refocus", "resident MiB", "working", "tree", "formula", "swap", "reuse", "used", "NLL")
    return Sheet("One session, along the way", columns, body)


def plot(path: Path, rows: list[dict]) -> None:
    """Time, memory and NLL over the tokens of history."""
    import matplotlib
    from matplotlib.figure import Figure

    x = [row["tokens"] / 1e3 for row in rows]
    panels = (
        ("CPU ms per token", {"all": [row["ms"] for row in rows]}),
        (
            "MiB",
            {
                "resident, without the tree": [(row["resident"] - row["tree"]) / MIB for row in rows],
                "tree": [row["tree"] / MIB for row in rows],
                "keys, values and their inputs": [row["working"] / MIB for row in rows],
            },
        ),
        ("NLL, nats per token", {"all": [row["nll"] for row in rows]}),
    )
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(16, 4.2), dpi=100, layout="constrained")  # no pyplot: no global state, no display
        for axes, (label, lines) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for name, values in lines.items():
                axes.plot(x, values, label=name, linewidth=1)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("thousand tokens of history")
            axes.set_ylabel(label)
            axes.grid(alpha=0.25)
            if len(lines) > 1:
                axes.legend(frameon=False, fontsize=8)
        with replacing(path) as part:
            figure.savefig(part, format="png")


def study(asked: argparse.Namespace) -> None:
    """The command.

    Raises:
        ValueError: a setting that is not allowed, too little text, or a folder with another study.
    """
    quiet()
    if asked.megacontext == "none":
        raise ValueError("--megacontext=none has an end: focus or recency")
    for name in ("tokens", "every"):
        if (value := getattr(asked, name)) < 1:
            raise ValueError(f"--{name}={value} is not allowed: at least 1")
    controller, out = controller_of(asked, tree=True), Path(asked.out)
    ids = text_of(controller.models.base.tokenizer, asked.path, asked.tokens, asked.seed)
    how = {name: getattr(asked, name) for name in ("budget", "megacontext", "positions", "every", "seed")}
    how["path"] = asked.path and str(Path(asked.path).absolute())
    with session_of(out / "session", controller, observers_of(asked, controller)) as session:
        if wrong := [f"{k}={v}, not {how[k]}" for k, v in session.about.get(HOW, how).items() if v != how[k]]:
            raise ValueError(f"--out={out}: it holds a study with other settings: {'; '.join(wrong)}")
        session.about[HOW] = how
        rows = carry(session, ids, asked.every)
        device = session.stream.device.type
    found = summary(rows, asked.budget)
    tables, notes = [sheet(rows)], notes_on(found, rows, asked.budget)
    show(tables, notes)
    stem = out / "endurance"
    write(
        stem, "One session that goes on", tables, notes, rows, how | {"device": device, "summary": found, "rows": rows}
    )
    plot(stem.with_suffix(".png"), rows)
    print(f"Tables and pictures: {stem}.md, .csv, .json and .png")


def notes_on(found: dict, rows: list[dict], budget: int) -> list[str]:
    """What the numbers say."""
    ms = [f"{found[name]:.2f}" for name in ("ms_first", "ms_last", "ms_low", "ms_high")]
    memory = [f"{found[name] / MIB:.1f}" for name in ("memory_first", "memory_last", "tree")]
    tokens = rows[-1]["tokens"]
    return [
        f"{tokens:,} tokens, {found['refocuses']:,} refocuses, a window of {budget:,} entries.",
        f"Time per token, last tenth over first tenth: {found['time']:.2f} ({ms[0]} -> {ms[1]} ms; 95 % of all"
        f" stretches between {ms[2]} and {ms[3]}).",
        f"Memory without the tree, likewise: {found['memory']:.2f} ({memory[0]} -> {memory[1]} MiB).",
        f"The tree takes {memory[2]} MiB, {found['tree'] / tokens:.1f} bytes per token:"
        f" {'exactly its formula, all along' if found['exact'] else 'NOT its formula'}.",
        f"NLL, first and last tenth: {found['nll_first']:.3f}, {found['nll_last']:.3f} (other texts).",
    ]


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.studies.endurance", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add_models(parser, budget=512)
    add("--path", help="files with text (default: the held-out part of the embedded text)")
    add("--tokens", type=int, default=32_768, help="to read (default 32768)")
    add("--every", type=int, default=4096, help="tokens per row of the table (default 4096)")
    add("--seed", type=int, default=0, help="of the order of the documents (default 0)")
    add(
        "--out",
        default="runs/endurance",
        help="folder of the session and the results, gone on with (default runs/endurance)",
    )
    return run(study, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
