"""What a plain causal pass costs by SDPA's causal kernels, and with a dense mask that says the same.

    python benchmarks/causal.py [--base asset:tiny-base]

Forward and backward of the base LM in bf16-mixed, loss included, 4,096 tokens at a time in windows of several lengths.
The two take turns and the median counts; on a CPU one thread and CPU time, so that other work changes little.
"""

import argparse
import sys
import time
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from megactx.framework.command_line import run
from megactx.lm import BaseLM, masks

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TOKENS, LENGTHS, REPEATS = 4_096, (512, 1_024, 2_048, 4_096), 5


def step(base: BaseLM, length: int, dense: bool) -> None:
    ids = torch.randint(5, 500, (TOKENS // length, length), device=DEVICE)
    positions = torch.arange(length, device=DEVICE).expand_as(ids)
    with torch.autocast(DEVICE, torch.bfloat16):
        hidden = base(base.embed(ids), positions, masks.causal(length, DEVICE) if dense else masks.CAUSAL)
        F.cross_entropy(base.logits(hidden[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten()).backward()
    base.zero_grad()


def seconds(base: BaseLM, length: int, dense: bool) -> float:
    if CUDA:
        torch.cuda.synchronize()
    clock = time.perf_counter if CUDA else time.process_time
    began = clock()
    step(base, length, dense)
    if CUDA:
        torch.cuda.synchronize()
    return clock() - began


def benchmark(args: argparse.Namespace) -> None:
    if not CUDA:
        torch.set_num_threads(1)
    base = BaseLM.from_pretrained(args.base, "float32").to(DEVICE).train()
    table = Table("tokens of a window", "dense mask, s", "causal kernels, s", "times", title=f"{args.base}, {DEVICE}")
    for length in LENGTHS:
        spent = {dense: [] for dense in (True, False)}
        for turn in range(REPEATS + 1):
            for dense, own in spent.items():
                own.append(seconds(base, length, dense))
                if turn == 0:
                    own.clear()  # it warms up
        dense, causal = (median(own) for own in spent.values())
        table.add_row(f"{length:,}", f"{dense:.2f}", f"{causal:.2f}", f"{dense / causal:.2f}")
    Console().print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="asset:tiny-base")
    return run(benchmark, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
