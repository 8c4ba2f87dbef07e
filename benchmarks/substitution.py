"""Packed substitution against the honest ways to compute the same numbers, side by side in one run.

    python benchmarks/substitution.py [--tokens 4096] [--horizons 32 64 128] [--base asset:tiny-base] [--compile]

Per horizon, over all eligible blocks of one document: NLL and KL of the H tokens behind a block that a gist replaces,
forward only.

    packed     one teacher pass, then all branches over its cache
    (a) full   one forward over the whole substituted document per block
    (b) cut    one forward per block, cut at s + K + H, teacher logits cached
    (c) prefix one pass of H rows per block over the teacher's cached prefix, one block at a time

The loops are timed on evenly spaced blocks, enough of them to run for some seconds, and scaled to all blocks. Every
opponent runs the head only on the H scored rows, in the same precision, under inference_mode, with plain causal
attention where its positions allow it. All four give the same numbers; the largest difference is printed. It runs on
a card where there is one. ``--compile`` times packed once more with the decoder compiled by ``torch.compile``, the
compilation itself apart.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from megactx.framework.command_line import run
from megactx.gist.substitution import substituted
from megactx.lm import BaseLM, masks
from megactx.lm.chunked_head import score
from megactx.lm.prefill import blocks, prefill, rows_at

BLOCK, OFFSET = 32, 31
ENOUGH = 4.0  # seconds of a loop that are timed


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def packed(base, ids, starts, gists, horizon):
    read = prefill(base, ids)
    hidden = substituted(base, read, starts, gists[None], [OFFSET], BLOCK, horizon)
    _, numbers = score(
        base,
        hidden.flatten(1, 3),
        rows_at(read.hidden, starts + BLOCK - 1, horizon).flatten(0, 2),
        blocks(ids, starts + BLOCK, horizon).flatten(),
    )
    return numbers["nll"][0].view(-1, horizon), numbers["kl"][0].view(-1, horizon)


class Loops:
    """The opponents; each call returns (NLL [H], KL [H]) of one block."""

    def __init__(self, base, ids, horizon):
        self.base, self.ids, self.horizon = base, ids, horizon
        self.prefill = prefill(base, ids)
        self.embedded = base.embed(ids)

    def _score(self, hidden, s):
        rows = slice(s + BLOCK, s + BLOCK + self.horizon)
        teacher = self.prefill.hidden[0, rows.start - 1 : rows.stop - 1]
        log_p = F.log_softmax(self.base.logits(teacher).float(), dim=-1)
        log_q = F.log_softmax(self.base.logits(hidden).float(), dim=-1)
        kl = F.kl_div(log_q, log_p.exp(), reduction="none").sum(-1)
        return F.nll_loss(log_q, self.ids[0, rows], reduction="none"), kl

    def _forward(self, s, gist, end):
        x = torch.cat(
            [self.embedded[:, :s], gist[None, None].to(self.embedded.dtype), self.embedded[:, s + BLOCK : end]], 1
        )
        positions = torch.cat([torch.arange(s), torch.arange(s + OFFSET, end)])[None].to(x.device)
        # With an empty cache and no mask the model takes its fast causal kernel, and the jump in positions is not read
        # as a border between packed sequences (it would be without the cache): the loop's best case.
        decoder = self.base.model.get_decoder()
        return decoder(inputs_embeds=x, position_ids=positions, past_key_values=DynamicCache()).last_hidden_state

    def full(self, s, gist):
        return self._score(self._forward(s, gist, self.ids.shape[1])[0, s : s + self.horizon], s)

    def cut(self, s, gist):
        return self._score(self._forward(s, gist, s + BLOCK + self.horizon - 1)[0, s : s + self.horizon], s)

    def prefix(self, s, gist):
        past = DynamicCache()
        for layer, (keys, values) in enumerate(self.prefill.cache):
            past.update(keys[:, :, :s], values[:, :, :s], layer)
        end = s + BLOCK + self.horizon - 1
        rows = torch.cat([gist[None, None].to(self.embedded.dtype), self.embedded[:, s + BLOCK : end]], 1)
        mask = masks.causal(s + self.horizon, rows.device)[:, :, s:]
        positions = torch.arange(s + OFFSET, end, device=rows.device)[None]
        return self._score(self.base(rows, positions, mask, past)[0], s)


@torch.inference_mode()
def bench(base, tokens, horizon, seed=0, compiled: str | None = None):
    """``compiled``: a backend of ``torch.compile``."""
    generator, model = torch.Generator().manual_seed(seed), base.model
    ids = torch.randint(2, base.vocab_size, (1, tokens), generator=generator).to(model.device)
    starts = torch.arange(BLOCK, tokens - BLOCK - horizon + 1, BLOCK, device=model.device)[None]
    gists = torch.randn(1, starts.shape[1], base.width, generator=generator).to(model.device)
    gists = (gists * base.embedding_rms()).to(model.dtype)

    def timed() -> tuple[float, torch.Tensor]:
        packed(base, ids, starts, gists, horizon)  # warm-up
        times = []
        for _ in range(3):
            began = clock(model.device)
            nll, _ = packed(base, ids, starts, gists, horizon)
            times.append(clock(model.device) - began)
        return sorted(times)[1], nll

    n = starts.shape[1]
    seconds, nll = timed()
    out = {"tokens": tokens, "horizon": horizon, "blocks": n, "spans_per_second": {"packed": n / seconds}}
    if compiled:
        decoder = model.get_decoder()
        with patch.object(decoder, "forward", torch.compile(decoder.forward, backend=compiled)):
            began = clock(model.device)
            packed(base, ids, starts, gists, horizon)
            out["compiling_seconds"] = clock(model.device) - began
            again, same = timed()
        out["compiled_times_faster"] = seconds / again
        out["compiled_nll_difference"] = (same - nll).abs().max().item()
    loops = Loops(base, ids, horizon)
    difference = 0.0
    for name in ("full", "cut", "prefix"):
        call = getattr(loops, name)
        call(int(starts[0, 0]), gists[0, 0])  # warm-up
        # Evenly spaced blocks: the cost of (b) and (c) grows along the document, and the mean is what counts.
        count, spent = 8, 0.0
        while True:
            chosen = torch.linspace(0, n - 1, min(count, n)).round().long().tolist()
            began = clock(model.device)
            results = [call(int(starts[0, i]), gists[0, i])[0] for i in chosen]
            spent = clock(model.device) - began
            if spent >= ENOUGH or count >= n:
                break
            count *= 2
        out["spans_per_second"][name] = len(chosen) / spent
        difference = max(difference, max((nll[i] - r).abs().max().item() for i, r in zip(chosen, results, strict=True)))
    out["ratio"] = {
        k: out["spans_per_second"]["packed"] / v for k, v in out["spans_per_second"].items() if k != "packed"
    }
    out["largest_nll_difference"] = difference
    out["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return out


def benchmark(arguments: argparse.Namespace) -> None:
    device = "cpu" if arguments.cpu or not torch.cuda.is_available() else "cuda"
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    base = BaseLM.from_pretrained(arguments.base, arguments.dtype).freeze().to(device)
    table = Table(title=f"spans per second, T = {arguments.tokens}, {arguments.dtype}, {where}")
    headings = [
        "H",
        "blocks",
        "packed",
        "(a) full",
        "(b) cut",
        "(c) prefix",
        "x (a)",
        "x (b)",
        "x (c)",
        "max dNLL",
        "peak MiB",
    ]
    for heading in headings:
        table.add_column(heading, justify="right")
    rows = []
    for horizon in arguments.horizons:
        backend = ("aot_eager" if device == "cpu" else "inductor") if arguments.compile else None
        row = bench(base, arguments.tokens, horizon, compiled=backend)
        rows.append(row)
        speed, ratio = row["spans_per_second"], row["ratio"]
        table.add_row(
            str(horizon),
            str(row["blocks"]),
            *[f"{speed[k]:.1f}" for k in ("packed", "full", "cut", "prefix")],
            *[f"{ratio[k]:.1f}" for k in ("full", "cut", "prefix")],
            f"{row['largest_nll_difference']:.1e}",
            f"{row['peak_memory_mib']:.0f}",
        )
    Console(width=120).print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.compile:
        print(
            "The packed pass with its decoder compiled, times faster: "
            + ", ".join(f"H = {row['horizon']} {row['compiled_times_faster']:.2f}" for row in rows)
        )
    about = {"base": arguments.base, "dtype": arguments.dtype, "accelerator": device, "device": where}
    arguments.out.write_text(json.dumps(about | {"rows": rows}, indent=1))
    print(f"Written to {arguments.out}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--horizons", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--base", default="asset:tiny-base")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="packed with the decoder compiled, too")
    parser.add_argument("--cpu", action="store_true", help="where there is a card, too")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/substitution.json"))
    return run(benchmark, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
