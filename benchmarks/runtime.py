"""What a session costs: per token at any length of its history, and until the first token, against full attention.

    python benchmarks/runtime.py [--model RUN_OR_EXPORT]
    python benchmarks/runtime.py --lengths 1000 10000 --prompts 2048 4096 --full-most 4096        in a minute
    python benchmarks/runtime.py --shapes smollm3                                                  on a GPU

First table, per token: histories of a length, then blocks of 32 tokens one by one, each with its refocus. Flat is the
claim, in time and in memory apart from the tree.

    decode     reading one token behind the window
    refocus    gist, room, LensNet and allocator, spread over the 32 tokens
    recompute  keys and values that edits have made invalid, likewise; reuse: share of the window that was kept
    working    keys, values and what they were computed from; tree: tokens, gists and what is known of them

Second table, until the first token of an answer to a prompt:

    full   the same base LM reads the whole prompt, every token attends to all before it
    warm   the tree is there (a library, an earlier session): the window is put together and read
    cold   tree and all gists are made first

Lengths above --full-most are not measured for full attention but computed from a fit a n + b n^2 to those below, and
marked with ~. The crossover is where cold, by its own linear fit, becomes faster than full. GistNet and, where the
model has none, LensNet have random weights and their default settings: costs depend on shapes only. The first table has
means, for room is made once in several blocks; its parts are by their share of wall time. The second has medians. On a
CPU all is CPU time of one thread, in fp32.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from megactx.focus import LensNet
from megactx.framework.command_line import run
from megactx.framework.run.device import choose
from megactx.gist import GistNet
from megactx.lm import BaseLM
from megactx.memory import MegaContextTree
from megactx.runtime import Controller, Models, Settings, load_models

BLOCK, WARM_UP = 32, 2  # blocks that are not timed
DECODE, RECOMPUTE = "decode", "read"  # of the seconds of an event; the others are the refocus
MIB = 2**20


def clock(device: str) -> float:
    """CPU time of this process, or the time when a GPU is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def models_of(arguments, device: str) -> Models:
    """The asked models, filled up with nets of default settings and random weights."""
    torch.manual_seed(0)
    if arguments.shapes == "smollm3":
        from shapes import SHAPES

        config = SHAPES["smollm3"]

        sizes = dict(num_hidden_layers=arguments.layers, hidden_size=arguments.width, vocab_size=arguments.vocabulary)
        sizes |= dict(intermediate_size=arguments.width * config["intermediate_size"] // config["hidden_size"])
        sizes |= dict(bos_token_id=None, eos_token_id=None, pad_token_id=1)
        with torch.device(device):
            base = BaseLM.from_config(config | sizes)
        models = Models(base, name="the shapes of SmolLM3-3B")
    else:
        models = load_models(arguments.model, device)
    gistnet = models.gistnet or GistNet(models.base.width, models.base.embedding_rms()).eval()
    lensnet = models.lensnet
    if lensnet is None:
        lensnet = LensNet(models.base.width, gistnet.block_size).eval()
        torch.nn.init.normal_(lensnet.last.weight)  # edits are always due
    return Models(models.base, gistnet, lensnet, models.name).to(device)


def ids_of(models: Models, tokens: int) -> torch.Tensor:
    ids = torch.randint(2, models.base.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    return ids.to(models.base.model.device)


@torch.no_grad()
def per_token(models: Models, tree: MegaContextTree, budget: int, kind: str, blocks: int) -> dict:
    """Decode behind a tree; -> milliseconds per token, and what is held."""
    device = models.base.model.device.type
    events, new = [], ids_of(models, BLOCK * (blocks + WARM_UP))
    length = int(tree.lengths[0])
    stream = Controller(models, Settings(budget, kind)).stream(tree=tree, observers=[events.append])
    stream.logits()
    for place in range(BLOCK * WARM_UP):
        stream.push(new[:, place])
    events.clear()
    each = []
    for block in range(WARM_UP, WARM_UP + blocks):
        began = clock(device)
        for place in range(BLOCK):
            stream.push(new[:, BLOCK * block + place])
        each.append(1e3 * (clock(device) - began) / BLOCK)

    wall = sum(sum(event.seconds.values()) for event in events)

    def part(wanted) -> float:
        return mean(each) * sum(s for event in events for n, s in event.seconds.items() if wanted(n)) / wall

    return {
        "kind": kind,
        "tokens": length,
        "ms": mean(each),
        "ms_each": each,
        "decode_ms": part(lambda name: name == DECODE),
        "recompute_ms": part(lambda name: name == RECOMPUTE),
        "refocus_ms": part(lambda name: name not in (DECODE, RECOMPUTE)),
        "reuse": sum(event.reuse for event in events) / len(events),
        "entries": int(stream.context.counts[0]),
        "working_bytes": stream.prefill.bytes(),
        "tree_bytes": tree.bytes(),
    }


@torch.no_grad()
def until_first(models: Models, tokens: int, budget: int, full: bool, repeats: int) -> dict:
    """Seconds until the first token of a prompt, each way."""
    device, ids = models.base.model.device.type, ids_of(models, tokens)
    controller, found = Controller(models, Settings(budget)), {"full": [], "warm": [], "cold": []}
    for _ in range(repeats):
        began = clock(device)
        stream = controller.stream()
        stream.append(ids)
        stream.logits()
        found["cold"].append(clock(device) - began)
        began = clock(device)
        controller.stream(tree=stream.tree).logits()
        found["warm"].append(clock(device) - began)
        if full:
            began = clock(device)
            models.base.model(input_ids=ids, logits_to_keep=1, use_cache=True)
            found["full"].append(clock(device) - began)
    return {"tokens": tokens} | {name: median(times) if times else None for name, times in found.items()}


def extrapolated(rows: list[dict]) -> tuple[list[float], list[float]]:
    """-> (a, b) of full = a n + b n^2, and (c, d) of cold = c + d n, by least squares over what was measured."""
    done = [row for row in rows if row["full"] is not None]
    n = np.array([row["tokens"] for row in done], float)
    weights = 1 / np.array([row["full"] for row in done])  # relative errors count
    full = np.linalg.lstsq(
        np.stack([n, n**2], 1) * weights[:, None], np.array([r["full"] for r in done]) * weights, rcond=None
    )[0]
    n = np.array([row["tokens"] for row in rows], float)
    cold = np.linalg.lstsq(np.stack([np.ones_like(n), n], 1), np.array([row["cold"] for row in rows]), rcond=None)[0]
    return full.tolist(), cold.tolist()


def crossover(full: list[float], cold: list[float]) -> float | None:
    """The length above which cold is faster; ``None``: nowhere, or by these fits at any length."""
    roots = np.roots([full[1], full[0] - cold[1], -cold[0]])
    found = [float(root.real) for root in roots if abs(root.imag) < 1e-9 and root.real > 0]
    return max(found) if found and full[1] > 0 else None


def sheet(title: str, headings: tuple, rows: list) -> None:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=130).print(table)


def benchmark(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    has_cuda = torch.cuda.is_available() and not args.cpu
    chosen = choose("cuda" if has_cuda else "cpu", "auto" if has_cuda else "32-true")
    models = models_of(args, chosen.accelerator)
    print(f"Device  {chosen.why}; {models.name}, budget {args.budget:,}", flush=True)
    rows, tree = [], MegaContextTree(models.gistnet, models.base, device=models.base.model.device)
    for length in track(sorted(args.lengths), "histories", disable=not sys.stdout.isatty()):
        missing = length - int(tree.lengths[0])
        if missing > 0:
            tree.append(ids_of(models, missing))
        rows += [per_token(models, tree, args.budget, kind, args.blocks) for kind in ("recency", "focus")]
    if rows:
        sheet(
            f"per token, budget {args.budget:,}",
            ("", "history", "ms", "decode", "refocus", "recompute", "reuse", "entries", "working, MiB", "tree, MiB"),
            [
                (row["kind"], f"{row['tokens']:,}")
                + tuple(f"{row[name]:.2f}" for name in ("ms", "decode_ms", "refocus_ms", "recompute_ms"))
                + (f"{row['reuse']:.0%}", f"{row['entries']:,}")
                + (f"{row['working_bytes'] / MIB:.1f}", f"{row['tree_bytes'] / MIB:.1f}")
                for row in sorted(rows, key=lambda row: row["kind"])
            ],
        )
    del tree
    most = args.full_most or (8_192 if chosen.accelerator == "cpu" else 10**9)
    prompts, fits, crossed = sorted({*args.prompts}), None, None
    if prompts:
        # Half of the longest that is measured too, or there would be nothing to fit.
        extra = [max(n for n in [*prompts, most] if n <= most) // 2]
        first = [
            until_first(models, n, args.budget, n <= most, args.repeats)
            for n in track(sorted({*prompts, *extra}), "prompts", disable=not sys.stdout.isatty())
        ]
        fits = extrapolated(first)
        crossed = crossover(*fits)
        for row in first:
            row["full_fit"] = fits[0][0] * row["tokens"] + fits[0][1] * row["tokens"] ** 2
        sheet(
            "until the first token, seconds",
            ("prompt", "full", "cold", "warm", "full / cold", "full / warm"),
            [
                (f"{row['tokens']:,}", f"{row['full']:.2f}" if row["full"] else f"~ {row['full_fit']:.2f}")
                + (f"{row['cold']:.2f}", f"{row['warm']:.2f}")
                + tuple(f"{(row['full'] or row['full_fit']) / row[name]:.1f}" for name in ("cold", "warm"))
                for row in first
            ],
        )
        said = "nowhere in these fits" if crossed is None else f"from {crossed:,.0f} tokens on"
        print(f"Cold is faster than full attention {said}")
    name = "runtime.json" if args.shapes == "own" else "runtime_smollm3.json"
    out = args.out or Path("benchmarks/out") / name
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    found = settings | {
        "accelerator": chosen.accelerator,
        "device": chosen.why,
        "per_token": rows,
        "until_first": first if prompts else [],
    }
    out.write_text(json.dumps(found | {"fits": fits, "crossover": crossed}, indent=1))
    print(f"Written to {out}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", choices=("own", "smollm3"), default="own", help="smollm3: random weights")
    parser.add_argument("--model", help="of --shapes own: a run or export (default: the embedded models)")
    parser.add_argument("--layers", type=int, default=36, help="of --shapes smollm3; fewer for a miniature")
    parser.add_argument("--width", type=int, default=2048, help="likewise, a multiple of 16")
    parser.add_argument("--vocabulary", type=int, default=128_256, help="likewise")
    parser.add_argument("--budget", type=int, default=2048, help="entries of the working context")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--prompts", type=int, nargs="*", default=[8_192, 32_768, 131_072], help="tokens, two or more")
    parser.add_argument("--full-most", type=int, help="the longest prompt for full attention (CPU: 8192; GPU: all)")
    parser.add_argument("--blocks", type=int, default=8, help="of 32 tokens that are timed")
    parser.add_argument("--repeats", type=int, default=1, help="of the second table")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, help="default: benchmarks/out/runtime.json, or runtime_smollm3.json")
    return run(benchmark, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
