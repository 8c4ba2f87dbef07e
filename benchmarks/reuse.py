"""What it costs to read again what stands behind an edit, and what it is worth: ``reuse=exact`` and ``approximate``.

    python benchmarks/reuse.py [--path TEXTS] [--texts 10] [--before 9000] [--tokens 640] [--budget 2048]

A focus session with the embedded models takes up the beginning of a text, and then reads on, a token at a time and with
a refocus every K tokens. NLL of what it reads on, above that of the first session on the same text; CPU time of one
thread a token, refocus included; share of the entries whose keys and values were kept.
"""

import argparse
import sys
import time
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from megactx.data.embedded import Embedded
from megactx.data.files import Files
from megactx.evaluation.bootstrap import mean_interval
from megactx.framework.bar import bar
from megactx.framework.command_line import run
from megactx.runtime import Controller, Session, Settings, load_models

ARMS = {
    "exact": {},
    "exact, edit_every=8": {"edit_every": 8},
    "approximate": {"reuse": "approximate"},
    "approximate, edit_every=8": {"reuse": "approximate", "edit_every": 8},
    "mega": {"attention": "mega"},
    "mega, edit_every=8": {"attention": "mega", "edit_every": 8},
}


def benchmark(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    models = load_models(args.model, "cpu")
    source = Files(args.path) if args.path else Embedded(4.0)
    texts = []
    for row in source.load():
        ids = models.base.tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        if len(ids) >= args.before + args.tokens:
            texts.append(torch.tensor(ids[: args.before + args.tokens]))
        if len(texts) == args.texts:
            break
    if len(texts) < args.texts:
        raise ValueError(
            f"--texts={args.texts}: only {len(texts)} have {args.before + args.tokens} tokens; try --before"
        )
    found = {name: [] for name in args.arms}
    for ids in bar("texts")(texts):
        for name in args.arms:
            kept: list[float] = []
            session = Session(Controller(models, Settings(args.budget, **ARMS[name])))
            session.append(ids[: args.before], follow=False)
            session.append(ids[args.before :][:1], score=True)  # the window is put together, which is not counted
            session.observers.append(lambda event, kept=kept: kept.append(event.reuse))
            began = time.process_time()
            nll = session.append(ids[args.before + 1 :], score=True)
            spent = 1e3 * (time.process_time() - began) / len(nll)
            shares = [share for share in kept if share is not None]
            found[name].append((float(nll.mean()), spent, sum(shares) / max(1, len(shares))))
    table = Table(
        title=f"{args.texts} texts, {args.before:,} tokens before, {args.tokens} read, budget {args.budget:,}"
    )
    for heading in ("session", "NLL", f"above {args.arms[0]}", "CPU ms a token", "of it", "kept"):
        table.add_column(heading, justify="right")
    first = found[args.arms[0]]
    for name, rows in found.items():
        above = torch.tensor([one[0] - other[0] for one, other in zip(rows, first, strict=True)])
        each = mean_interval(torch.arange(len(above)), above)
        cost, usual = (median(row[1] for row in own) for own in (rows, first))
        mean = sum(row[0] for row in rows) / len(rows)
        cells = [f"{mean:.4f}", f"{each.point:+.4f} [{each.low:+.4f}, {each.high:+.4f}]", f"{cost:.2f}"]
        table.add_row(name, *cells, f"{cost / usual:.2f}", f"{sum(row[2] for row in rows) / len(rows):.0%}")
    Console(width=130).print(table)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a run or export (default: the embedded models)")
    parser.add_argument("--path", help="texts (default: the embedded text)")
    parser.add_argument("--texts", type=int, default=10)
    parser.add_argument("--before", type=int, default=9000, help="tokens that the session has taken up")
    parser.add_argument("--tokens", type=int, default=640, help="that it reads on")
    parser.add_argument("--budget", type=int, default=2048, help="entries of the working context")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="the first one is compared with")
    return run(benchmark, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
