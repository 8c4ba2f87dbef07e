"""What focusing costs: a measured value against a plain re-run, and a refocus against decoding 32 tokens.

    python benchmarks/focus.py [--base asset:tiny-base]
    python benchmarks/focus.py --shapes smollm3 --tokens --cpu --layers 2 --width 64 --vocabulary 512 --windows 128

First table, per label: random windows at a share of T tokens, 32 edits of each (what a lens stage measures) or all
that are legal, H = 32.

    measured   ``measure_values``: one pass over the window, then packed branches from where each edit begins
    plain      each edit made in a copy of the window, which is then read anew; evenly spaced edits, the same values

Second table, per refocus: W entries of a tree of 16 W tokens, batch 1.

    LensNet    embeddings of the entries, and the net over them
    allocator  what is legal, price, scores, and the choice of edits
    edits      making them
    decode     32 tokens one by one by the base LM, over a cache of the W entries
    graph      the same by a session's reader at fixed shapes, on a card as one CUDA graph
    prefill    reading the W entries anew: the most that edits can cost in recomputed keys and values

With ``--shapes smollm3`` the base has the shapes of SmolLM3-3B and random weights; both depend on shapes only, as they
do on the encoder, which is a mean. LensNet has its default settings and random weights, so that edits are always due.
The goal is a refocus below 3 % of decoding, at these shapes and W = 2,048, on a GPU. Medians; on a CPU in CPU time of
one thread, in fp32.
"""

import argparse
import inspect
import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from megactx.focus import Edits, moves
from megactx.focus.allocator import FocusAllocator
from megactx.focus.edit_labels import continuation_nll, measure_values
from megactx.focus.lensnet import LensNet
from megactx.focus.sampling import draw, measured_share
from megactx.framework.command_line import run
from megactx.framework.run.device import choose
from megactx.lm import BaseLM, masks
from megactx.memory import MegaContextTree, WorkingContext
from megactx.runtime.incremental_prefill import IncrementalPrefill

BLOCK, HORIZON, NEW = 32, 32, 32
TOKENS_PER_ENTRY = 16  # of the trees of the second table
UNBOUNDED = 10**9  # a budget: an edit that breaks it is measured too


class Mean:
    """The cheapest encoder: 32 vectors -> their mean."""

    block_size = BLOCK

    def __init__(self, width: int):
        self.width = width

    def encode_block(self, embeddings):  # [E, K, D] -> [E, D]
        return embeddings.mean(1)

    def offset_in(self, tokens: int) -> int:
        return tokens - 1


class Stopwatch:
    """Seconds by name: CPU time of this process, or the time until a GPU is done."""

    def __init__(self, device: str):
        self.device, self.seconds = device, {}

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def __call__(self, name: str):
        began = self.now()
        yield
        self.seconds.setdefault(name, []).append(self.now() - began)

    def around(self, name: str, function):
        def timed(*arguments):
            with self(name):
                return function(*arguments)

        return timed

    def median(self, name: str) -> float:
        """Of all but the first, which is warm-up, in milliseconds."""
        return 1e3 * median(self.seconds[name][1:])


def ids_of(base: BaseLM, tokens: int) -> torch.Tensor:
    """[1, T]: source code, again and again, or random ids where there is no tokenizer."""
    if base.tokenizer is None:
        ids = torch.randint(2, base.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    else:
        ids = torch.tensor([base.tokenizer(inspect.getsource(argparse))["input_ids"]])
        ids = ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens]
    return ids.to(base.model.device)


@torch.no_grad()
def labels(base: BaseLM, tokens: int, share: float, count: int | None, sample: int, repeats: int) -> dict:
    """Cost of the values of ``count`` edits of a window, or of all."""
    ids = ids_of(base, tokens + HORIZON)
    tree, following = MegaContextTree.from_tokens(ids[:, :tokens], Mean(base.width), base), ids[:, tokens:]
    generator, watch = torch.Generator().manual_seed(1), Stopwatch(tree.device.type)
    context = draw("random", tree, int(share * tokens), generator)
    edits = moves(context).edits(context)
    edits = edits if count is None else measured_share(edits, count, generator)
    chosen = torch.linspace(0, len(edits) - 1, min(sample, len(edits))).long().tolist()
    for _ in range(repeats + 1):
        with watch("measured"):
            values, before = measure_values(base, context, edits, following)
        with watch("plain"):
            again = [plain_nll(base, context, edits[n : n + 1], following) for n in chosen]
    again = torch.where(edits.expand[chosen], 1, -1) * (before - torch.stack(again))
    return {
        "tokens": tokens,
        "budget": share,
        "entries": int(context.counts[0]),
        "edits": len(edits),
        "measured_ms": watch.median("measured") / len(edits),
        "plain_ms": watch.median("plain") / len(chosen),
        "largest_difference": (values[chosen] - again).abs().max().item(),
        "seconds": watch.seconds,
    }


def plain_nll(base: BaseLM, context: WorkingContext, edit: Edits, following: torch.Tensor) -> torch.Tensor:
    edited = context.copy()
    edited.budget = UNBOUNDED
    edit.apply(edited)
    return continuation_nll(base, edited, following).mean()


@torch.no_grad()
def refocusing(base: BaseLM, lens: LensNet, entries: int, repeats: int) -> dict:
    """Cost of the refocuses of a session, one behind the other, and of decoding over its window."""
    tree = MegaContextTree.from_tokens(ids_of(base, TOKENS_PER_ENTRY * entries), Mean(base.width), base)
    context, allocator = WorkingContext.recency(tree, entries), FocusAllocator()
    watch, half, made = Stopwatch(tree.device.type), base.model.dtype == torch.bfloat16, []
    read, apply = watch.around("lensnet", lens.read), watch.around("edits", Edits.apply)
    for _ in range(repeats + 1):
        with patch.object(lens, "read", read), patch.object(Edits, "apply", apply), watch("refocus"):
            with torch.autocast(tree.device.type, torch.bfloat16, enabled=half):
                scores = lens.score(context, moves(context, allocator.protected), allocator.margin(lens.tau))
            edits = allocator.refocus(context, scores.score, scores.price)
        made.append(len(edits))
    decoding(base, context, watch, repeats)
    parts = zip(*(watch.seconds[name] for name in ("refocus", "lensnet", "edits")), strict=True)
    watch.seconds["allocator"] = [whole - lensnet - edits for whole, lensnet, edits in parts]
    names = ("lensnet", "allocator", "edits", "refocus", "decode", "graph")
    milliseconds = {name: watch.median(name) for name in names}
    return {
        "window": entries,
        "entries": int(context.counts[0]),
        "edits": mean(made[1:]),
        "ms": milliseconds | {"prefill": 1e3 * min(watch.seconds["prefill"])},
        "graph_times_faster": milliseconds["decode"] / milliseconds["graph"],
        "share_of_decoding": {name: ms / milliseconds["decode"] for name, ms in milliseconds.items()},
        "seconds": watch.seconds,
    }


def decoding(base: BaseLM, context: WorkingContext, watch: Stopwatch, repeats: int) -> None:
    """Decode greedily from the window, again and again."""
    embeddings, device = context.to_tensor(), context.lod.device
    length, end = embeddings.shape[1], int(context.ends()[0])
    for _ in range(2):
        cache = DynamicCache()
        with watch("prefill"):
            hidden = base(embeddings, context.positions(), masks.causal(length, device), cache)
    for _ in range(repeats + 1):
        token = base.logits(hidden[:, -1:]).argmax(-1)
        with watch("decode"):
            for step in range(NEW):
                sees = torch.ones(1, 1, 1, length + step + 1, dtype=torch.bool, device=device)
                position = torch.full((1, 1), end + step, device=device)
                token = base.logits(base(base.embed(token), position, sees, cache)).argmax(-1)
        cache.crop(-NEW)
    reader = IncrementalPrefill(base, graphs=True)
    reader.read(embeddings, context.positions(), context.lengths)
    for _ in range(repeats + 1):
        token = base.logits(reader.hidden).argmax(-1, keepdim=True)
        with watch("graph"):
            for step in range(NEW):
                hidden = reader.step(token, torch.full((1, 1), end + step, device=device))
                token = base.logits(hidden).argmax(-1)
        reader.read(embeddings, context.positions(), context.lengths)


def base_of(arguments, device: str, bf16: bool) -> BaseLM:
    dtype = torch.bfloat16 if bf16 else torch.float32
    if arguments.shapes == "tiny":
        return BaseLM.from_pretrained(arguments.base).freeze().to(device, dtype)
    from shapes import SHAPES

    config = SHAPES["smollm3"]

    sizes = dict(num_hidden_layers=arguments.layers, hidden_size=arguments.width, vocab_size=arguments.vocabulary)
    sizes |= dict(intermediate_size=arguments.width * config["intermediate_size"] // config["hidden_size"])
    sizes |= dict(bos_token_id=None, eos_token_id=None, pad_token_id=1)  # not all vocabularies have its own
    torch.manual_seed(0)
    with torch.device(device):
        return BaseLM.from_config(config | sizes).freeze().to(dtype)


def lensnet_of(base: BaseLM) -> LensNet:
    torch.manual_seed(0)
    lens = LensNet(base.width, BLOCK)
    torch.nn.init.normal_(lens.last.weight)
    return lens.to(base.model.device).eval().requires_grad_(False)


def sheet(title: str, headings: tuple, rows: list) -> None:
    if not rows:
        return
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=130).print(table)


def benchmark(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    has_cuda = torch.cuda.is_available() and not arguments.cpu
    chosen = choose("cuda" if has_cuda else "cpu", "auto" if has_cuda else "32-true")
    base = base_of(arguments, chosen.accelerator, chosen.precision == "bf16-mixed")
    lens = lensnet_of(base)
    modules = {"base": base, "lensnet": lens}
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    print(
        f"Device  {chosen.why}; parameters: base {parameters['base']:,}, LensNet {parameters['lensnet']:,}", flush=True
    )
    first = [
        labels(base, tokens, share, count, arguments.sample, arguments.repeats)
        for tokens in arguments.tokens
        for share in arguments.budgets
        for count in (32, None)
    ]
    sheet(
        f"cost of a label, H = {HORIZON}",
        ("T", "budget", "W", "labels", "measured, ms", "plain, ms", "plain / measured", "largest difference, nats"),
        [
            (f"{row['tokens']:,}", f"{row['budget']:g}", f"{row['entries']:,}", str(row["edits"]))
            + (f"{row['measured_ms']:.1f}", f"{row['plain_ms']:.1f}", f"{row['plain_ms'] / row['measured_ms']:.1f}")
            + (f"{row['largest_difference']:.1e}",)
            for row in first
        ],
    )
    second = [refocusing(base, lens, entries, arguments.repeats) for entries in arguments.windows]
    names = ("lensnet", "allocator", "edits", "refocus", "decode", "graph", "prefill")
    sheet(
        f"a refocus against decoding {NEW} tokens, ms",
        ("W", "entries", "edits made", *names, "refocus / decode", "LensNet / decode"),
        [
            (f"{row['window']:,}", f"{row['entries']:,}", f"{row['edits']:.1f}")
            + tuple(f"{row['ms'][name]:,.1f}" for name in names)
            + tuple(f"{row['share_of_decoding'][name]:.1%}" for name in ("refocus", "lensnet"))
            for row in second
        ],
    )
    out = arguments.out or Path("benchmarks/out") / (
        "focus.json" if arguments.shapes == "tiny" else "focus_smollm3.json"
    )
    settings = {key: value for key, value in vars(arguments).items() if key != "out"}
    out.parent.mkdir(parents=True, exist_ok=True)
    found = settings | {"accelerator": chosen.accelerator, "device": chosen.why, "parameters": parameters}
    found |= {"labels": first, "refocusing": second}
    out.write_text(json.dumps(found, indent=1))
    print(f"Written to {out}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", choices=("tiny", "smollm3"), default="tiny", help="smollm3: random weights")
    parser.add_argument("--base", default="asset:tiny-base", help="of --shapes tiny")
    parser.add_argument("--layers", type=int, default=36, help="of --shapes smollm3; fewer for a miniature")
    parser.add_argument("--width", type=int, default=2048, help="likewise, a multiple of 16")
    parser.add_argument("--vocabulary", type=int, default=128_256, help="likewise")
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048, 4096], help="T; none: no first table")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.125], help="shares of T")
    parser.add_argument("--sample", type=int, default=16, help="edits that are measured by plain re-runs too")
    parser.add_argument("--windows", type=int, nargs="*", default=[512, 2048, 8192], help="W; none: no second table")
    parser.add_argument("--repeats", type=int, default=3, help="that are timed; one before them is not")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="benchmarks/out/focus.json, or focus_smollm3.json")
    return run(benchmark, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
