"""How fast every carrier learns and is made, and GistNet against the matrix products that it consists of.

    python benchmarks/encode.py [--base asset:tiny-base] [--widths 256 2048] [--matmul]

    training    one carrier at a time through the gist stage: teacher pass, carriers, packed pass, loss, backward,
                AdamW; replaced blocks per second
    encode      all blocks of a document of 4,096 tokens: the carriers alone, and with the base LM's pass that they need
    of matmul   ``GistNet.encode_span`` against its own matrix products, recorded while it runs and done again by
                themselves: same shapes, strides and dtype, operands already cast, attention as its two products

The carriers are those of ``experiment=ladder``, in fp32 on a CPU and in bf16 on a GPU. What is compared takes turns,
and the median of the repeats counts, on a CPU on one thread and in CPU time, so that other work changes little.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megactx.framework.command_line import run
from megactx.framework.config.search_path import compose
from megactx.gist import GistNet
from megactx.gist.carriers.avgpool import AvgPool
from megactx.lm.prefill import prefill, unread
from megactx.stages.gist import GistStage

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DOCUMENTS, TOKENS, SPANS, HORIZON = 2, 512, 8, 32  # of a training step
TEXT = 4_096
REPEATS = 7
TARGET = 0.4  # of the matmul rate, in fp32 on a CPU, in bf16 on a GPU
PRECISION = "bfloat16" if CUDA else "float32"
BLOCKS = (256, 2048) if CUDA else (16, 128)  # that GistNet encodes at once


def seconds(*calls: Callable[[], object]) -> list[float]:
    """Median of each; the first turn warms up."""
    spent = [[] for _ in calls]
    for turn in range(REPEATS + 1):
        for own, call in zip(spent, calls, strict=True):
            began = now()
            call()
            if turn:
                own.append(now() - began)
    return [median(own) for own in spent]


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def stage_of(base: str) -> GistStage:
    """The ladder's stage: every compressor in it."""
    settings = OmegaConf.to_container(compose(["experiment=ladder"]).stage, resolve=True)
    settings = {key: value for key, value in settings.items() if key not in ("_target_", "ladder")}
    stage = GistStage(**settings | {"base": {"name": base}}).to(DEVICE)
    stage.base.to(getattr(torch, PRECISION))
    return stage


def bench_carrier(stage: GistStage, name: str, net: nn.Module) -> dict:
    """Blocks per second of training, tokens per second of encoding."""
    generator = torch.Generator().manual_seed(0)
    block, base = net.block_size, stage.base
    ids = torch.randint(2, base.vocab_size, (DOCUMENTS, max(TOKENS, TEXT)), generator=generator).to(DEVICE)
    starts = torch.linspace(1, (TOKENS - HORIZON) // block - 1, SPANS).long() * block
    batch = {
        "ids": ids[:, :TOKENS],
        "block_starts": starts.expand(DOCUMENTS, -1).to(DEVICE),
        "lengths": torch.full((DOCUMENTS,), TOKENS, device=DEVICE),
    }
    out = {"carrier": name, "parameters": sum(p.numel() for p in net.parameters()), "spans_per_second": None}
    with torch.autocast(DEVICE, torch.bfloat16, enabled=CUDA):
        if out["parameters"]:
            stage.nets, stage.with_states = nn.ModuleDict({name: net}), net.needs_hidden
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)

            def step():
                optimizer.zero_grad()
                stage.losses[0].per_net(stage.context(batch))[0].sum().backward()
                optimizer.step()

            out["spans_per_second"] = DOCUMENTS * SPANS / seconds(step)[0]
        text, reads = ids[:1, :TEXT], net.needs_hidden or not net.makes_vectors
        every = torch.arange(block, TEXT, block, device=DEVICE)[None]
        with torch.inference_mode():
            context = prefill(base, text, net.needs_hidden) if reads else unread(text)
            alone, read = seconds(
                lambda: net.compress(base, context, every), lambda: reads and prefill(base, text, net.needs_hidden)
            )
    return out | {"encode_tokens_per_second": TEXT / alone, "with_base_tokens_per_second": TEXT / (alone + read)}


class Products(TorchDispatchMode):
    """Records every matrix product inside as a pair of operands, empty ones of the same shape, strides and dtype."""

    def __init__(self):
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self._keep(*args[:2])
        elif name in ("addmm", "baddbmm"):
            self._keep(*args[1:3])
        elif name.startswith("_scaled_dot_product"):
            query, key, value = (x.flatten(0, 1) for x in args[:3])
            self._keep(query, key.transpose(1, 2))
            self._keep(query.new_empty(*query.shape[:2], key.shape[1]), value)
        return function(*args, **(kwargs or {}))

    def _keep(self, left: Tensor, right: Tensor) -> None:
        like = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in (left, right)]
        self.pairs.append(tuple(like))

    def flops(self) -> int:
        return sum(2 * left.numel() * right.shape[-1] for left, right in self.pairs)


def bench_matmul(width: int, dtype: str, blocks: int) -> dict:
    """GistNet of default settings against its matrix products."""
    torch.manual_seed(0)
    net = GistNet(width, 1.0).to(DEVICE).eval()
    embeddings = torch.randn(blocks, net.block_size, width, device=DEVICE)

    def encode():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
            net.encode_block(embeddings)

    with torch.no_grad():
        with Products() as products:
            encode()
        for pair in products.pairs:
            for operand in pair:
                operand.normal_()
        encoding, multiplying = seconds(encode, lambda: [left @ right for left, right in products.pairs])
    out = {"width": width, "dtype": dtype, "blocks": blocks}
    return out | {
        "encode_gflops": products.flops() / encoding / 1e9,
        "matmul_gflops": products.flops() / multiplying / 1e9,
        "share": multiplying / encoding,
        "tokens_per_second": blocks * net.block_size / encoding,
    }


def benchmark(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    stage = stage_of(arguments.base)
    nets = {} if arguments.matmul else dict(stage.nets) | {"avgpool": AvgPool(stage.main.block_size)}
    carriers = [bench_carrier(stage, *item) for item in track(nets.items(), "carriers", transient=True)]
    widths = arguments.widths or [stage.base.width, *([2048] if CUDA else [])]
    cases = [(width, dtype, n) for width in widths for dtype in ("float32", "bfloat16") for n in BLOCKS]
    rates = [bench_matmul(*case) for case in track(cases, "matmul", transient=True)]
    console = Console(width=120)
    table = Table(title=f"every carrier, base {arguments.base}, {PRECISION}, {DEVICE}")
    for heading in ("carrier", "parameters", "training spans/s", "encode tokens/s", "with the base's pass"):
        table.add_column(heading, justify="left" if heading == "carrier" else "right")
    for row in carriers:
        spans = "-" if row["spans_per_second"] is None else f"{row['spans_per_second']:,.1f}"
        speeds = [f"{row[key]:,.0f}" for key in ("encode_tokens_per_second", "with_base_tokens_per_second")]
        table.add_row(row["carrier"], f"{row['parameters']:,}", spans, *speeds)
    if carriers:
        console.print(table)
    table = Table(title=f"GistNet encode against its own matrix products, {DEVICE}")
    for heading in ("width", "dtype", "blocks", "matmul GFLOP/s", "encode GFLOP/s", "of matmul", "encode tokens/s"):
        table.add_column(heading, justify="right")
    for row in rates:
        speeds = [f"{row['matmul_gflops']:,.1f}", f"{row['encode_gflops']:,.1f}", f"{row['share']:.0%}"]
        table.add_row(str(row["width"]), row["dtype"], str(row["blocks"]), *speeds, f"{row['tokens_per_second']:,.0f}")
    console.print(table)
    least = min(row["share"] for row in rates if row["dtype"] == PRECISION)
    verdict = "reached" if least >= TARGET else "NOT reached"
    print(f"Target, at least {TARGET:.0%} of matmul in {PRECISION} on {DEVICE}: {verdict}, {least:.0%} at the least")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"base": arguments.base, "accelerator": DEVICE, "precision": PRECISION}
    arguments.out.write_text(json.dumps(about | {"carriers": carriers, "matmul": rates}, indent=1))
    print(f"Written to {arguments.out}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="asset:tiny-base")
    parser.add_argument("--widths", type=int, nargs="+", help="of the GistNet (default: the base's, on a GPU 2048 too)")
    parser.add_argument("--matmul", action="store_true", help="only the second table")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/encode.json"))
    return run(benchmark, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
