"""Training steps of a GistNet on a base with the shapes of a known one and random weights: how long, how much memory.

    python benchmarks/shapes.py [--shapes smollm3] [--tokens 16384] [--batch 1] [--spans 16] [--steps 10]
    python benchmarks/shapes.py --cpu --layers 2 --tokens 512 --spans 2 --steps 2

Time and memory depend on shapes only, so nothing is downloaded. A step is what experiment=smollm3_3b_stage1 does with
one batch: teacher pass, the default GistNet and blockmean_linear on the same blocks, packed pass, KL, backward and
AdamW; in bf16 where the device has it. The peak is printed beside what megactx.gist.memory_estimate computed before;
MFU is the FLOPs of a step as ``callbacks=counted`` counts them, by its time, of what the card's data sheet says.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import default_convert

from megactx.data.spans import SpanBatches
from megactx.framework.callbacks.flops import Counter
from megactx.framework.callbacks.throughput import peak
from megactx.framework.command_line import run
from megactx.framework.run.device import choose
from megactx.gist import GistNet
from megactx.gist.memory_estimate import in_words, memory_estimate
from megactx.gist.substitution import substituted
from megactx.lm import BaseLM
from megactx.lm.chunked_head import score
from megactx.lm.prefill import blocks, prefill, rows_at

# What matters here of the published config.json of HuggingFaceTB/SmolLM3-3B and SmolLM2-135M.
SHAPES = {
    "smollm3": dict(
        model_type="smollm3",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=4,
        no_rope_layer_interval=4,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
    ),
    "smollm2": dict(
        model_type="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
}


def loss_of(base, nets, batch, horizon):
    """Mean KL over the blocks of a batch, summed over the nets."""
    ids, starts = batch["ids"], batch["block_starts"]
    block = nets[0].block_size
    read = prefill(base, ids)
    embedded = base.embed(blocks(ids, starts, block)).flatten(0, 1)
    gists = torch.stack([net.encode_block(embedded).view(*starts.shape, -1) for net in nets])
    hidden = substituted(base, read, starts, gists, [net.offset for net in nets], block, horizon)
    loss, _ = score(
        base,
        hidden.flatten(1, 3),
        rows_at(read.hidden, starts + block - 1, horizon).flatten(0, 2),
        blocks(ids, starts + block, horizon).flatten(),
    )
    return loss.mean(dim=1).sum()


def bench(arguments, device: str, bf16: bool) -> dict:
    """-> seconds of each step, losses, bytes."""
    torch.manual_seed(0)
    with torch.device(device):
        config = SHAPES[arguments.shapes]
        base = BaseLM.from_config(config | {"num_hidden_layers": arguments.layers or config["num_hidden_layers"]})
        base.freeze()
        base.to(torch.bfloat16 if bf16 else torch.float32)
        rms = base.embedding_rms()
        nets = [GistNet(base.width, rms), GistNet(base.width, rms, type="mean", head="linear", skip="none")]
    parameters = [p for net in nets for p in net.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    shape = (arguments.batch, arguments.tokens, arguments.spans, arguments.horizon)
    expected = memory_estimate(base, nets, *shape, device)
    print(f"Memory of a step: {in_words(expected)}", flush=True)
    numbers = np.random.default_rng(0).integers(2, base.vocab_size, (arguments.batch, arguments.tokens))
    documents = [{"input_ids": row, "domain": "narrative", "text": i} for i, row in enumerate(numbers)]
    batches = SpanBatches(documents, {"narrative": 1}, arguments.batch, arguments.spans, 32, arguments.horizon, seed=0)
    seconds, losses = [], []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step(index: int) -> float:
        batch = {
            key: value.to(device) if torch.is_tensor(value) else value
            for key, value in default_convert(batches[index]).items()
        }
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = loss_of(base, nets, batch, arguments.horizon)
        loss.backward()
        for net in nets:
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()  # waits for the device

    with Counter() as counted:
        step(0)
    for index in range(arguments.steps):
        began = time.perf_counter()
        losses.append(step(index + 1))
        seconds.append(time.perf_counter() - began)
    highest = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    row = {"seconds": seconds, "losses": losses, "peak": highest, "expected": sum(expected.values())}
    return row | {"flops": counted.total}


def benchmark(arguments: argparse.Namespace) -> None:
    if not arguments.cpu and not torch.cuda.is_available():
        raise ValueError("no CUDA on this machine; a miniature is --cpu --layers 2 --tokens 512 --spans 2 --steps 2")
    chosen = choose("cpu" if arguments.cpu else "cuda", "auto")
    print(f"Device  {chosen.why}", flush=True)
    row = bench(arguments, chosen.accelerator, chosen.precision == "bf16-mixed")
    middle = statistics.median(row["seconds"])
    row |= {
        "accelerator": chosen.accelerator,
        "device": chosen.why,
        "step_seconds": middle,
        "tokens_per_second": arguments.batch * arguments.tokens / middle,
        "spans_per_second": arguments.batch * arguments.spans / middle,
    }
    card = peak(torch.cuda.get_device_name()) if chosen.accelerator == "cuda" else None
    row["mfu"] = row["flops"] / middle / card if card else None
    table = Table(title=f"Shapes of {arguments.shapes}, T = {arguments.tokens}, B = {arguments.batch}")
    for heading in ("step, s", "tokens/s", "blocks/s", "TFLOP a step", "MFU", "peak GB", "expected GB"):
        table.add_column(heading, justify="right")
    table.add_row(
        f"{middle:.2f}",
        f"{row['tokens_per_second']:.0f}",
        f"{row['spans_per_second']:.1f}",
        f"{row['flops'] / 1e12:.2f}",
        f"{row['mfu']:.0%}" if row["mfu"] else "-",
        f"{row['peak'] / 1e9:.1f}",
        f"{row['expected'] / 1e9:.1f}",
    )
    Console(width=100).print(table)
    settings = {key: value for key, value in vars(arguments).items() if key != "out"}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(settings | row, indent=1))
    print(f"Written to {arguments.out}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", choices=tuple(SHAPES), default="smollm3")
    parser.add_argument("--layers", type=int, help="fewer for a miniature")
    parser.add_argument("--tokens", type=int, default=16384, help="of a document")
    parser.add_argument("--batch", type=int, default=1, help="documents")
    parser.add_argument("--spans", type=int, default=16, help="blocks of a document")
    parser.add_argument("--horizon", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="that are timed; one before them is not")
    parser.add_argument("--cpu", action="store_true", help="for a miniature; a figure of the CPU says little")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/shapes.json"))
    return run(benchmark, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
