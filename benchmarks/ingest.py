"""What taking up text costs: a GistNet fills a tree, the base LM prefills the same tokens, side by side in one run.

    python benchmarks/ingest.py [--tokens 4096 16384] [--base asset:tiny-base]

    ingest     ``MegaContextTree.append`` in pieces of 4,096 tokens, with a GistNet of default settings: every level
    prefill    the base LM fills a cache with the same tokens, in chunks of 4,096 that each begin anew; no logits

Both in fp32 on one thread. They take turns, and the median of three runs counts, in CPU time, so that other work on the
machine changes little. GistNet's weights are fresh: training changes what it says, not what it costs.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from megactx import BaseLM, GistNet, MegaContextTree
from megactx.framework.command_line import run

PIECE, REPEATS = 4_096, 3


def ingest(base: BaseLM, gistnet: GistNet, ids: torch.Tensor) -> MegaContextTree:
    tree = MegaContextTree(gistnet, base)
    for piece in ids.split(PIECE, dim=1):
        tree.append(piece)
    return tree


@torch.inference_mode()
def prefill(base: BaseLM, ids: torch.Tensor) -> None:
    for chunk in ids.split(PIECE, dim=1):
        base(base.embed(chunk), None, cache=DynamicCache())


def seconds(function, *arguments) -> float:
    began = time.process_time()
    function(*arguments)
    return time.process_time() - began


def bench(base: BaseLM, gistnet: GistNet, tokens: int) -> dict:
    ids = torch.randint(2, base.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    times = {"ingest": [], "prefill": []}
    for _ in range(REPEATS):
        times["ingest"].append(seconds(ingest, base, gistnet, ids))
        times["prefill"].append(seconds(prefill, base, ids))
    tree = ingest(base, gistnet, ids)
    return {
        "tokens": tokens,
        "gists": [int(tree.counts(lod)) for lod in range(1, tree.depth + 1)],
        "tokens_per_second": {name: tokens / median(spent) for name, spent in times.items()},
        "share_of_prefill": median(times["ingest"]) / median(times["prefill"]),
        "seconds": times,
    }


def benchmark(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    base = BaseLM.from_pretrained(arguments.base, "float32").freeze()
    gistnet = GistNet(base.width, base.embedding_rms()).eval()
    bench(base, gistnet, 1_024)  # warm-up
    rows = [bench(base, gistnet, tokens) for tokens in arguments.tokens]
    table = Table(title="tokens per second of CPU time, one thread, fp32")
    for heading in ("tokens", "gists", "ingest", "prefill", "cost of ingest / prefill"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['tokens']:,}",
            " + ".join(f"{count:,}" for count in row["gists"]),
            *(f"{row['tokens_per_second'][name]:,.0f}" for name in ("ingest", "prefill")),
            f"{row['share_of_prefill']:.2f}",
        )
    Console(width=120).print(table)
    parameters = {"base": base, "gistnet": gistnet}
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in parameters.items()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(
        json.dumps({"base": arguments.base, "parameters": parameters, "piece": PIECE, "rows": rows}, indent=1)
    )
    print(f"Written to {arguments.out}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4_096, 16_384])
    parser.add_argument("--base", default="asset:tiny-base")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/ingest.json"))
    return run(benchmark, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
