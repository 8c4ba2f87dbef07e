"""What a window costs to read as it grows: full attention, MegaAttention, and a sliding window of equal pairs.

    python benchmarks/long_windows.py [--lengths 2048 4096 8192 16384 65536] [--segment 256 --mid 256 --live 256]

The embedded models read that many tokens, drawn at random, at once and without gradient. Each reading is a process of
its own: CPU seconds of one thread, the least of ``--turns``, and how far its memory rises above what it held before.
Positions beyond what the base LM was trained on cost what others do, so only times and bytes are told.
"""

import argparse
import ctypes
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megactx.evaluation.attention import raw
from megactx.framework.bar import bar
from megactx.framework.command_line import run
from megactx.memory import MegaContextTree
from megactx.memory.pyramid import PLAIN, Attention
from megactx.runtime import load_models
from megactx.studies.mega_attention import window_of

ARMS = ("full", "mega", "window")
MEGABYTES = 1 / 1024  # of the kilobytes that Linux counts in


@torch.no_grad()
def reading(model: str | None, arm: str, length: int, sizes: dict, turns: int) -> tuple[float, float, float]:
    """-> CPU seconds, megabytes above those before, share of the pairs of full attention."""
    torch.set_num_threads(1)
    models = load_models(model, "cpu")
    ids = torch.randint(models.base.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    context = raw(MegaContextTree.from_tokens(ids[None], models.gistnet, models.base))
    mega, block = Attention("mega", **sizes), models.gistnet.block_size
    share = float(mega.pairs(context)) if arm != "full" else 1.0
    window = Attention("window", window=window_of(share, length, block)) if arm == "window" else None
    attention = {"full": PLAIN, "mega": mega, "window": window}[arm]
    ctypes.CDLL(None).malloc_trim(0)  # what making the tree has left would hide what reading takes
    Path("/proc/self/clear_refs").write_text("5")  # and the peak so far is its own
    before, seconds = _kilobytes("VmRSS"), []
    for _ in range(turns):
        began = time.process_time()
        attention.read(models.base, context)
        seconds.append(time.process_time() - began)
    return min(seconds), (_kilobytes("VmHWM") - before) * MEGABYTES, share


def _kilobytes(what: str) -> int:
    """Of this process: ``VmRSS`` now, ``VmHWM`` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def benchmark(args: argparse.Namespace) -> None:
    sizes = {name: getattr(args, name) for name in ("segment", "mid", "live", "overlap")}
    net = load_models(args.model, "cpu").gistnet
    if net is None:
        raise ValueError(f"--model={args.model}: there is no GistNet for it")
    Attention("mega", **sizes).check(net.block_size)
    for name, value, least in (("lengths", min(args.lengths), 2 * net.block_size), ("turns", args.turns, 1)):
        if value < least:
            raise ValueError(f"--{name}={value} is not allowed: at least {least}")
    table = Table("tokens", "read with", "CPU s", "of full", "MB more", "pairs")
    asked = [(length, arm) for length in args.lengths for arm in ARMS]
    full = 0.0
    for length, arm in bar("readings")(asked):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            seconds, memory, share = pool.submit(reading, args.model, arm, length, sizes, args.turns).result()
        full = seconds if arm == "full" else full
        table.add_row(f"{length:,}", arm, f"{seconds:.2f}", f"{seconds / full:.2f}", f"{memory:,.0f}", f"{share:.1%}")
        print(f"{length:,} {arm}: {seconds:.2f} s, {memory:,.0f} MB", flush=True)  # what a stop would lose
    Console().print(table)


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks/long_windows.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="base and GistNet that belong together; without it the embedded ones")
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096, 8192, 16384, 65536], help="tokens")
    parser.add_argument("--turns", type=int, default=1, help="readings of each (default 1)")
    for name, default in (("segment", 256), ("mid", 256), ("live", 256), ("overlap", 128)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"of MegaAttention (default {default})")
    return run(benchmark, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
