"""What rounding of kept prefills does to a training step of a GistNet: its gradient over them, against a fresh pass.

    python benchmarks/prefill_precision.py experiment=smollm2 data.path=TEXTS --gistnet asset:smollm2-gistnet
    python benchmarks/prefill_precision.py experiment=demo --seeds 1

Per seed one batch, read three ways: anew, from files of 32 bits, from files of 16 bits. The error is that of the
gradient of all that learns, |g - g'| / |g|; beside it the difference of the losses, and as a scale the distance between
the gradients of two batches, by which a step is random anyway. The rest are settings of ``train.py``.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import default_convert

from megactx.framework.command_line import run
from megactx.lm.prefill_cache import KEPT, PrefillCache
from megactx.parts.read import gistnet_of
from megactx.stages.prefills import composed


def step(stage, batch: dict) -> tuple[float, Tensor]:
    """Loss of the subject, and the gradient of all that it learns, flat."""
    stage.zero_grad()
    loss = stage.losses[0].per_net(stage.context(batch))[0][0]
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in stage.main.parameters() if p.grad is not None])


def measured(overrides: list[str], gistnet: str | None, seed: int) -> tuple[float, Tensor, dict[str, tuple]]:
    """Of one batch: loss, gradient, and what kept prefills make of both: dtype -> (error, difference of the loss)."""
    cfg, _ = composed([*overrides, f"seed={seed}"])
    torch.manual_seed(seed)
    stage, data = (instantiate(part, _convert_="all") for part in (cfg.stage, cfg.datamodule))
    if gistnet:
        stage.main.load_state_dict(gistnet_of(gistnet, stage.base, "--gistnet").state_dict())
    stage.prepare(data)
    data.setup("fit")
    stage.set_dtype(torch.float32)  # a base that is stored in bf16 has no more digits than fp16 keeps
    stage.eval()  # without dropout, whose draws would differ
    batch, found = default_convert(data.training[seed]), {}
    loss, gradient = step(stage, batch)
    for kept in reversed(KEPT):
        with tempfile.TemporaryDirectory() as place:
            stage.kept = PrefillCache(stage.base, 100, kept, stage.kept_layers, Path(place))
            other, own = step(stage, batch)
        found[kept] = ((own - gradient).norm() / gradient.norm()).item(), other - loss
    return loss, gradient, found


def benchmark(args: argparse.Namespace) -> None:
    table = Table("seed", "kept in", "error of the gradient", "difference of the loss", title="Kept prefills")
    before = None
    for seed in range(args.seeds):
        loss, gradient, found = measured(args.overrides, args.gistnet, seed)
        for kept, (error, difference) in found.items():
            table.add_row(str(seed), kept, f"{error:.1e}", f"{difference:+.1e}, loss {loss:.4f}")
        if before is not None:
            table.add_row(f"{seed - 1}, {seed}", "two batches", f"{(before - gradient).norm() / before.norm():.2f}", "")
        before = gradient
    Console(width=100).print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", help="settings of train.py")
    parser.add_argument("--gistnet", help="whose weights the subject has; without it they are fresh")
    parser.add_argument("--seeds", type=int, default=3, help="batches, each of a seed of its own")
    return run(benchmark, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
