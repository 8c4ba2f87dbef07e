"""What a step of end-to-end training costs: tokens per second and peak memory, by how many windows are read.

    python benchmarks/end_to_end.py [--base asset:tiny-base] [--variants 8 32 128] [--tokens 4096] [--steps 3]

One document of T tokens, N1 = N2 / 4 sources, budgets of T / 8 entries, H = 32; forward and backward, no optimizer.
Tokens are those that the base LM reads in windows, rows of windows times their length. Every row of the table runs in
a process of its own:

    all at once     every window in one pass
    8 at once       gradients of eight windows at a time, with the same sum
    recomputed      ... and GistNet keeps no activations
    LoRA            ... and adapters of rank 8 on all layers learn too

Memory is what is added to that of the loaded parts: on a CPU resident memory at its peak, watched from a thread, on a
GPU what its allocator gave out.
"""

import argparse
import inspect
import json
import multiprocessing
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from megactx.assets import resolve
from megactx.framework.command_line import run
from megactx.framework.files import replacing

KINDS = {
    "all at once": ["stage.windows.per_pass=1000", "stage.recompute=false"],
    "8 at once": ["stage.recompute=false"],
    "recomputed": [],
    "LoRA": ["stage.train_base=lora", "stage.lora.rank=8", "stage.lora.layers=all"],
}


class Peak:
    """The most resident memory while it is open, in bytes."""

    def __enter__(self):
        self.process, self.most, self.open = psutil.Process(), 0, True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self):
        while self.open:
            self.most = max(self.most, self.process.memory_info().rss)
            time.sleep(0.002)

    def __exit__(self, *error):
        self.open = False
        self.thread.join()


def measure(base: str, variants: int, kind: str, tokens: int, steps: int, device: str, gistnet: str) -> dict:
    """Steps of one kind; -> seconds per step, tokens per second, peak MiB."""
    from hydra.utils import instantiate

    from megactx.framework.config.search_path import compose

    overrides = ["experiment=end_to_end", "preset=demo", f"base.name={base}", f"stage.gistnet={gistnet}"]
    overrides += ["stage.lens=null"]  # what it weighs does not depend on what it has learned
    overrides += [f"stage.windows.sources={max(1, variants // 4)}", f"stage.windows.variants={variants}"]
    overrides += ["stage.budgets=[0.125]", "folder=unused", *KINDS[kind]]
    stage = instantiate(compose(overrides).stage, _convert_="all")
    stage.log, stage.data = lambda *arguments, **settings: None, argparse.Namespace(seed=0)
    half = device == "cuda"
    stage.base.to(torch.bfloat16 if half else torch.float32)
    for parameter in stage.base_parameters():
        parameter.data = parameter.data.float()
    stage.to(device)
    stage.learns("gist", "lens", "lora")
    ids = torch.tensor([stage.base.tokenizer(inspect.getsource(argparse))["input_ids"]], device=device)
    ids = ids.repeat(1, -(-(tokens + 32) // ids.shape[1]))[:, : tokens + 32]
    before, seconds, read = psutil.Process().memory_info().rss, [], 0
    if half:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with Peak() as peak:
        for step in range(steps + 1):
            began = time.perf_counter() if half else time.process_time()
            with torch.autocast(device, torch.bfloat16, enabled=half):
                found = stage.losses(ids, tokens, step)
            found["loss"].backward()
            stage.zero_grad()
            if half:
                torch.cuda.synchronize()
            seconds.append((time.perf_counter() if half else time.process_time()) - began)
            read = int(found["kinds"]) * (tokens // 8 + 32)
    most = torch.cuda.max_memory_allocated() if half else peak.most
    middle = sorted(seconds[1:])[len(seconds[1:]) // 2]  # the first is warm-up
    return {
        "variants": variants,
        "kind": kind,
        "tokens": tokens,
        "windows_read": int(found["kinds"]),
        "seconds_per_step": middle,
        "tokens_per_second": read / middle,
        "peak_mib": (most - before) / 2**20,
        "device": device,
    }


def alone(*arguments) -> dict:
    """In a process of its own: nobody's memory but its own is counted."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def benchmark(args: argparse.Namespace) -> None:
    resolve(args.base)  # a mistake is told here, not by the process that measures
    rows = []
    for variants in args.variants:
        for kind in args.kinds:
            rows.append(alone(args.base, variants, kind, args.tokens, args.steps, args.device, args.gistnet))
            print(f"N2 = {variants}, {kind}: {rows[-1]['seconds_per_step']:.2f} s per step", flush=True)
    table = Table(title=f"a step on {args.tokens:,} tokens, {args.base}, {args.device}")
    for heading in ("N2", "kind", "windows read", "s/step", "tokens/s", "peak MiB"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for row in rows:
        numbers = (f"{row['seconds_per_step']:.2f}", f"{row['tokens_per_second']:,.0f}", f"{row['peak_mib']:,.0f}")
        table.add_row(str(row["variants"]), row["kind"], str(row["windows_read"]), *numbers)
    Console(width=100).print(table)
    with replacing(args.out) as part:
        part.write_text(json.dumps(rows, indent=1))
    print(f"Written to {args.out}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="asset:tiny-base")
    parser.add_argument("--gistnet", default="asset:tiny-gistnet")
    parser.add_argument("--variants", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/end_to_end.json"))
    return run(benchmark, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
