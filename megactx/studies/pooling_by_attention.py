"""Can attention learn to pool? Gisting trained only to match the keys and values of AvgPool (arXiv 2504.08934).

    python -m megactx.studies.pooling_by_attention                                every ``compressor=`` that makes keys
    python -m megactx.studies.pooling_by_attention --base FOLDER --path TEXTS --steps 1000

Gisting beats nothing where a mean of the states would, and GistPool was built on the suspicion that attention does not
find that mean by itself. Here nothing else is asked of it: the loss is the squared error to what ``AvgPool`` would keep
of the same block, relative to that of a constant state, the mean over all blocks: 1 is that, 0 is AvgPool itself.

L layers, D width.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from megactx.data.embedded import Embedded
from megactx.data.files import DOMAINS, Files
from megactx.data.spans_module import SpanData
from megactx.evaluation.table import Report, Sheet, Table, pivot
from megactx.framework.bar import bar
from megactx.framework.config.search_path import compose, root
from megactx.framework.optimizers import warmup_cosine
from megactx.gist.carrier import Compressor, KVSlots, windows
from megactx.gist.carriers.avgpool import AvgPool
from megactx.gist.compressors import build
from megactx.lm import BaseLM
from megactx.lm.kv_hooks import keys_values
from megactx.lm.prefill import Prefill, prefill

from .study import Options, command, usable
from .trained import base_of

POINTS = 6  # columns of the table of residuals over steps
MEAN_OVER = 8  # batches that the constant state is the mean of
LEGEND = (
    "residual = squared error to AvgPool's keys and values / that of one constant state, the mean of all blocks; mean"
    " over layers, keys and values, on held-out blocks: 1 is a constant, 0 is AvgPool."
)
NOTE = "Without the shift the first layer keeps the gist token's own embedding: it has seen nothing, so at best 1."


def variants(base: BaseLM, block: int, chosen: Iterable[str] | None = None) -> dict[str, Compressor]:
    """A compressor for each option of the config group ``compressor`` that makes keys and values.

    Args:
        chosen: names of options; ``None``: all of them.

    Raises:
        ValueError: an option that there is not, or that makes vectors.
    """
    known, out = sorted(path.stem for path in (root("configs") / "compressor").glob("*.yaml")), {}
    for name in chosen or known:
        if name not in known:
            raise ValueError(f"--only={name}: no such option of compressor; there is {', '.join(known)}")
        config = compose([f"compressor={name}", f"block_size={block}"])
        net = build(base, OmegaConf.to_container(config.compressor, resolve=True)) if name != "gistnet" else None
        if net is not None and not net.makes_vectors:
            out[name] = net.to(base.model.device)
        elif chosen:
            raise ValueError(f"--only={name}: it makes vectors; the question is about keys and values")
    return out


def mean_states(base: BaseLM, batches: Iterable[dict], block: int) -> Tensor:
    """The input of every layer, mean over all tokens of the blocks of some batches: [L, D]."""
    return torch.stack([_mean(*_read(base, batch), block) for batch in batches]).mean(dim=0)


class Target:
    """What AvgPool keeps of the blocks of one batch, and the squared error to it of a constant state, means [L, D]."""

    def __init__(self, base: BaseLM, batch: dict, net: Compressor, means: Tensor):
        self.prefill, self.starts = _read(base, batch)
        self.wanted = AvgPool(net.block_size, net.position).compress(base, self.prefill, self.starts)
        # In place of the variance of keys, which are rotated: a constant state has the rotation of every block's place.
        constant = [mean.expand(*self.starts.shape, -1) for mean in means]
        kept = keys_values(base.model.get_decoder(), constant, self.starts + net.offset)
        self.spread = squared_error(KVSlots(kept), self.wanted)

    def error(self, base: BaseLM, net: Compressor) -> Tensor:
        """[L, 2] of what the net keeps of these blocks."""
        return squared_error(net.compress(base, self.prefill, self.starts), self.wanted)


def squared_error(made: KVSlots, wanted: KVSlots) -> Tensor:
    """[L, 2]: of each layer's keys and values, summed over blocks and channels."""
    pairs = [zip(*layers, strict=True) for layers in zip(made.layers, wanted.layers, strict=True)]
    return torch.stack([torch.stack([(own - other).square().sum() for own, other in pair]) for pair in pairs])


@torch.no_grad()
def measure(base: BaseLM, nets: Mapping[str, Compressor], batches: Iterable[dict], means: Tensor) -> dict[str, Tensor]:
    """Name -> residual of each layer's keys and values, [L, 2], over all blocks of the batches."""
    error, spread = dict.fromkeys(nets, 0.0), 0.0
    for batch in batches:
        target = Target(base, batch, next(iter(nets.values())), means)
        spread = spread + target.spread
        error = {name: error[name] + target.error(base, net) for name, net in nets.items()}
    return {name: value / spread for name, value in error.items()}


def train(
    base: BaseLM,
    nets: Mapping[str, Compressor],
    batches: Sequence[dict],
    held: Sequence[dict],
    steps: int,
    lr: float,
) -> Table:
    """Train every net on the same batches, each with its own optimizer.

    Args:
        nets: of one block size and position.
        batches: of training documents, without an end.
        held: held-out documents.
        steps, lr: of AdamW with a warm-up and a cosine.

    Returns:
        Of every net ``parameters`` and the ``residual``, mean over layers, after so many steps (a span); at the end of
        the ``keys`` and ``values`` of every layer (a span).
    """
    shown = sorted({round(steps * (index / (POINTS - 1)) ** 2) for index in range(POINTS)})  # denser at the beginning
    optimizers = {name: torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0) for name, net in nets.items()}
    leader = next(iter(nets.values()))
    means = mean_states(base, (batches[index] for index in range(MEAN_OVER)), leader.block_size)
    table = Table()
    sizes = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    table.add_all(sizes, "carrier", metric="parameters")

    def residuals(step: int) -> dict[str, Tensor]:
        found = measure(base, nets, held, means)
        values = {name: value.mean().item() for name, value in found.items()}
        table.add_all(values, "carrier", metric="residual", span=step)
        return found

    residuals(0)
    for step in bar("training")(range(1, steps + 1)):
        target = Target(base, batches[step - 1], leader, means)
        for name, net in nets.items():
            for group in optimizers[name].param_groups:
                group["lr"] = lr * warmup_cosine(step - 1, max(1, steps // 20), steps, 0.0)
            optimizers[name].zero_grad()
            (target.error(base, net) / target.spread).mean().backward()
            optimizers[name].step()
        if step in shown:
            last = residuals(step)
    for name, layers in last.items():
        for number, (keys, values) in enumerate(layers.tolist(), start=1):
            table.add_all({"keys": keys, "values": values}, "metric", carrier=name, span=f"layer {number}")
    return table


def _read(base: BaseLM, batch: dict) -> tuple[Prefill, Tensor]:
    ids, starts = (torch.as_tensor(batch[name]).to(base.model.device) for name in ("ids", "block_starts"))
    return prefill(base, ids, with_states=True), starts.sort(dim=1).values


def _mean(prefill: Prefill, starts: Tensor, block: int) -> Tensor:
    return torch.stack([windows(states, starts, block).mean(dim=(0, 1, 2)) for states in prefill.states[:-1]])


def sheets(table: Table, about: dict) -> list[Sheet]:
    """Residual over steps, and at the end by layer."""
    columns = [("parameters", "parameters", ",d")]
    steps = table.pick(metric="residual").names("span")
    columns += [(str(step), {"metric": "residual", "span": step}, ".3f") for step in steps]
    title = (
        f"can attention learn to pool: residual to AvgPool after so many steps ({about['base']}, blocks of"
        f" {about['block_size']}, {about['held']} held-out blocks)"
    )
    out = [pivot(title, table, columns)]
    for what in ("keys", "values"):
        own = table.pick(metric=what)
        layers = [(layer, {"span": layer}, ".3f") for layer in own.names("span")]
        out.append(pivot(f"{what} by layer, after {steps[-1]} steps", own, layers))
    return out


def options(given: Options) -> None:
    given.add("--base", default="asset:tiny-base", help="the base LM")
    given.path("files to train on; one text in ten is held out; without it the embedded text")
    given.add("--only", nargs="+", metavar="OPTION", help="of the group compressor (default: all)")
    given.number("steps", 300, "of 4 documents with 16 blocks each")
    given.add("--lr", type=float, default=1e-2, help="of AdamW")
    given.number("block-size", 32, "K")
    given.number("tokens", 544, "of a document")
    given.number("seed", 0, "of initialisation and sampling", least=0)
    given.add("--out", type=Path, default=Path("runs/pooling_by_attention"), help="folder for the tables")


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """Train and measure.

    Raises:
        ValueError: a setting that is not allowed, or no text that is long enough; the message names it.
    """
    if not args.lr > 0:
        raise ValueError(f"--lr={args.lr} is not allowed: above 0")
    stem = usable(args.out) / "pooling_by_attention"
    torch.manual_seed(args.seed)
    base = base_of(args.base)
    nets = variants(base, args.block_size, args.only)
    source = Files(args.path) if args.path else Embedded()
    sizes = {"min_tokens": args.tokens, "max_tokens": args.tokens, "batch": 4, "spans": 16, "seed": args.seed}
    sizes |= {"validation_documents": 24, "validation_blocks": 16, "weights": dict.fromkeys(DOMAINS)}
    data = SpanData(source, base.tokenizer, args.block_size, 1, **sizes)
    data.limit_to(base.max_positions)
    data.setup()
    held = list(data.val_dataloader())
    about = {"base": args.base, "block_size": args.block_size, "lr": args.lr, "seed": args.seed, "text": args.path}
    about["held"] = sum(batch["block_starts"].shape[1] for batch in held)
    table = train(base, nets, data.training, held, args.steps, args.lr)
    yield stem, Report("Can attention learn to pool?", table, sheets(table, about), LEGEND, [NOTE], about)


main = command("pooling_by_attention", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
