"""What a tree and a working context cost: time and memory per token, and the time to put a working context together.

    python benchmarks/memory.py [--tokens 10000 100000 1000000 10000000] [--width 256]

The encoder is a mean, so that what is timed is the tree's own work. Every row of the first table runs in a process of
its own, on one thread, which appends pieces of 4,096 tokens:

    us per token    CPU time of the whole run, and of its last 10 % alone: flat is the claim
    memory          growth of the process's resident set at its peak, over the bytes of tokens, gists and what is known
                    of each gist; bytes per source token of these, and of tokens and gists alone

Then, from a tree of a million tokens, fifty cold starts at a budget of 8,192 entries, each after 32 more tokens, in
wall time: the entries alone, and with the embeddings that the base LM reads.

Last, a tree of two million tokens is saved, and saved again after 32 more tokens: bytes written, and wall time.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from megactx.framework.command_line import run
from megactx.memory import MegaContextTree, WorkingContext

BLOCK, PIECE = 32, 4_096
VOCABULARY = 8_192


class Mean:
    """The cheapest encoder: 32 vectors -> their mean, in fp16."""

    block_size = BLOCK

    def __init__(self, width: int):
        self.width = width

    def encode_block(self, embeddings):  # [E, K, D] -> [E, D]
        return embeddings.mean(1).half()

    def offset_in(self, tokens: int) -> int:
        return tokens - 1


def grow(tree: MegaContextTree, tokens: int) -> tuple[float, float, int]:
    """Append ``tokens``; -> seconds of all, seconds per token of the last tenth, peak resident bytes."""
    process, peak, marks = psutil.Process(), 0, []
    generator = torch.Generator().manual_seed(0)
    spent = 0.0
    for start in range(0, tokens, PIECE):
        piece = torch.randint(VOCABULARY, (1, min(PIECE, tokens - start)), generator=generator)
        began = time.process_time()
        tree.append(piece)
        spent += time.process_time() - began
        marks.append((start + piece.shape[1], spent))
        peak = max(peak, process.memory_info().rss)
    at, before = next((n, s) for n, s in marks if n >= 0.9 * tokens or len(marks) == 1)
    last = (spent - before) / (tokens - at) if at < tokens else spent / tokens
    return spent, last, peak


@torch.no_grad()
def appending(tokens: int, width: int) -> dict:
    torch.set_num_threads(1)
    table = torch.nn.Embedding(VOCABULARY, width).half()
    grow(MegaContextTree(Mean(width), table), 70_000)  # warm-up: kernels, allocator
    before = psutil.Process().memory_info().rss
    tree = MegaContextTree(Mean(width), table)
    seconds, last, peak = grow(tree, tokens)
    stored = tree.bytes()
    plain = sum(level.bytes(column) for level in tree.levels for column in ("token", "gist") if column in level.columns)
    held = sum(t.nbytes for level in tree.levels for page in level.pages for t in page.values())
    return {
        "tokens": tokens,
        "width": width,
        "us_per_token": seconds / tokens * 1e6,
        "us_per_token_last_tenth": last * 1e6,
        "mib": stored / 2**20,
        "peak_over_bytes": (peak - before) / stored,
        "allocated_over_bytes": held / stored,
        "bytes_per_token": stored / tokens,
        "bytes_per_token_without_metadata": plain / tokens,
    }


@torch.no_grad()
def assembling(tokens: int, width: int, budget: int, repeats: int = 50) -> dict:
    torch.set_num_threads(1)
    table = torch.nn.Embedding(VOCABULARY, width).half()
    tree = MegaContextTree(Mean(width), table)
    grow(tree, tokens)
    entries, both = [], []
    for _ in range(repeats + 1):
        tree.append(torch.randint(VOCABULARY, (1, BLOCK)))
        began = time.perf_counter()
        context = WorkingContext.recency(tree, budget)
        entries.append(time.perf_counter() - began)
        context.to_tensor(), context.positions()
        both.append(time.perf_counter() - began)

    def spread(times: list[float]) -> dict:
        times = torch.tensor(times[1:]) * 1e3  # the first is warm-up
        return {"median_ms": times.median().item(), "p99_ms": times.quantile(0.99).item()}

    return {
        "tokens": tokens,
        "width": width,
        "budget": budget,
        "entries": int(context.counts[0]),
        "plan": spread(entries),
        "plan_and_embeddings": spread(both),
    }


@torch.no_grad()
def saving(tokens: int, width: int) -> list[dict]:
    torch.set_num_threads(1)
    tree = MegaContextTree(Mean(width), torch.nn.Embedding(VOCABULARY, width).half())
    grow(tree, tokens)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for what in ("the first save", "after 32 more tokens"):
            began, before = time.perf_counter(), psutil.Process().io_counters().write_bytes
            tree.save(Path(folder) / "tree")
            seconds = time.perf_counter() - began
            written = psutil.Process().io_counters().write_bytes - before
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
            rows.append({"what": what, "mb": size / 1e6, "mb_written": written / 1e6, "seconds": seconds})
            tree.append(torch.randint(VOCABULARY, (1, BLOCK)))
    return rows


def alone(function, *arguments):
    """In a process of its own: nobody's memory but its own is counted."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def benchmark(arguments: argparse.Namespace) -> None:
    rows = [alone(appending, tokens, arguments.width) for tokens in arguments.tokens]
    rows.append(alone(appending, arguments.assemble, arguments.wide))
    table = Table(title="appending, one thread, encoder = mean, fp16")
    for heading in ("tokens", "D", "us/token", "last 10 %", "MiB", "peak/bytes", "allocated/bytes", "B/token", "plain"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['tokens']:,}",
            str(row["width"]),
            f"{row['us_per_token']:.2f}",
            f"{row['us_per_token_last_tenth']:.2f}",
            f"{row['mib']:.1f}",
            f"{row['peak_over_bytes']:.3f}",
            f"{row['allocated_over_bytes']:.3f}",
            f"{row['bytes_per_token']:.2f}",
            f"{row['bytes_per_token_without_metadata']:.2f}",
        )
    Console(width=120).print(table)
    assembly = alone(assembling, arguments.assemble, arguments.wide, arguments.budget)
    table = Table(title=f"working context of {assembly['entries']:,} entries from {arguments.assemble:,} tokens")
    for heading in ("", "median ms", "p99 ms"):
        table.add_column(heading, justify="right")
    for name in ("plan", "plan_and_embeddings"):
        table.add_row(name.replace("_", " "), f"{assembly[name]['median_ms']:.1f}", f"{assembly[name]['p99_ms']:.1f}")
    Console(width=120).print(table)
    saves = alone(saving, arguments.save, arguments.width)
    table = Table(title=f"a tree of {arguments.save:,} tokens on disk")
    for heading in ("", "MB", "MB written", "seconds"):
        table.add_column(heading, justify="right")
    for row in saves:
        table.add_row(row["what"], f"{row['mb']:.1f}", f"{row['mb_written']:.1f}", f"{row['seconds']:.2f}")
    Console(width=120).print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"appending": rows, "assembling": assembly, "saving": saves}, indent=1))
    print(f"Written to {arguments.out}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--width", type=int, default=256, help="of the trees of all lengths")
    parser.add_argument(
        "--wide", type=int, default=2048, help="of the tree whose bytes per token are compared with 136"
    )
    parser.add_argument("--assemble", type=int, default=1_000_000, help="tokens of the tree for working contexts")
    parser.add_argument("--budget", type=int, default=8192)
    parser.add_argument("--save", type=int, default=2_000_000, help="tokens of the tree that is saved")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/memory.json"))
    return run(benchmark, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
