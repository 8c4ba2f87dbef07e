"""What a refocus costs when keys and values are kept by node under MegaAttention, beside plain attention.

    python benchmarks/node_prefill.py [--path TEXT] [--tokens 5000] [--budget 2048] [--blocks 20]

A focus session with the embedded models goes on over a text, block by block. After each refocus both readers read the
same window: the plain one keeps what stands before the first edit, the other what no edit reaches. CPU time of one
thread, reading new tokens not counted. Mega's base LM was not trained for the mask: this is about time.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from megactx.framework.command_line import run
from megactx.memory import MegaContextTree
from megactx.memory.pyramid import Attention
from megactx.runtime import Controller, Settings, load_models
from megactx.runtime.incremental_prefill import IncrementalPrefill
from megactx.runtime.node_prefill import NodePrefill

WARM_UP = 2  # refocuses that are not counted
SIZES = ((256, 1024, 256), (128, 1024, 128), (64, 1024, 64))  # segment, mid, live


def benchmark(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    models = load_models(None, "cpu")
    base, block = models.base, models.gistnet.block_size
    paths = [Path(args.path)] if args.path else sorted(Path("docs").glob("*.md"))
    text = "\n".join(path.read_text() for path in paths)
    wanted = args.tokens + block * (args.blocks + WARM_UP + 1)
    ids = torch.tensor(base.tokenizer(text, add_special_tokens=False)["input_ids"])[None, :wanted]
    if ids.shape[1] < wanted:
        raise ValueError(f"--tokens={args.tokens}: the text has {ids.shape[1]} tokens, {wanted} are needed")
    if wanted > base.max_positions:
        raise ValueError(f"--tokens={args.tokens}: the base takes {base.max_positions} positions, {wanted} are needed")
    tree = MegaContextTree(models.gistnet, base)
    with torch.no_grad():
        tree.append(ids[:, : args.tokens])
    stream = Controller(models, Settings(args.budget, "focus")).stream(tree=tree)
    stream.logits()
    plain = IncrementalPrefill(base)
    mega = {sizes: NodePrefill(base, Attention("mega", *sizes)) for sizes in SIZES}
    found = {name: [] for name in ("plain", *SIZES)}  # (share that was kept, ms)
    for number in range(args.blocks + WARM_UP):
        for token in ids[0, args.tokens + block * number :][:block]:
            stream.push(token[None])
        context = stream.context
        for name, reader in {"plain": plain, **mega}.items():
            began = time.process_time()
            if name == "plain":
                spread = models.gistnet.spread(context.lods())
                reader.read(context.to_tensor(), context.positions(), context.lengths, spread)
            else:
                reader.read(context)
            spent = 1e3 * (time.process_time() - began)
            if number >= WARM_UP:
                found[name].append((float(reader.reused[0] / reader.lengths[0]), spent))
        new = ids[:, args.tokens + block * (number + 1) :][:, :block]  # read behind the window, as a session does
        at = int(context.ends()) + torch.arange(block)[None]
        plain.step(new, at)
        for reader in mega.values():
            reader.step(new, at)
    table = Table(title=f"{args.blocks} refocuses, budget {args.budget:,}, history {args.tokens:,} tokens")
    for heading in ("attention", "kept, mean", "ms, median", "min", "max", "of plain"):
        table.add_column(heading, justify="right")
    usual = median(ms for _, ms in found["plain"])
    for name, rows in found.items():
        times = [ms for _, ms in rows]
        label = name if name == "plain" else "mega: segment {}, mid {}, live {}".format(*name)
        kept = sum(share for share, _ in rows) / len(rows)
        cells = (f"{value:.1f}" for value in (median(times), min(times), max(times)))
        table.add_row(label, f"{kept:.0%}", *cells, f"{median(times) / usual:.2f}")
    Console(width=110).print(table)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--path", help="a text file (default: the pages in docs/)")
    parser.add_argument("--tokens", type=int, default=5000, help="of the history (default 5000)")
    parser.add_argument("--budget", type=int, default=2048, help="entries of a window (default 2048)")
    parser.add_argument("--blocks", type=int, default=20, help="refocuses (default 20)")
    return run(benchmark, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
