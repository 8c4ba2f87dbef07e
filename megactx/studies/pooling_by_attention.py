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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from megactx.data.embedded import Embedded
from megactx.data.files import DOMAINS, Files
from megactx.data.spans_module import SpanData
from megactx.evaluation.sheets import Sheet
from megactx.framework.bar import bar
from megactx.framework.command_line import run
from megactx.framework.config.search_path import compose, root
from megactx.framework.optimizers import warmup_cosine
from megactx.gist.carrier import Compressor, Slots, windows
from megactx.gist.carriers.avgpool import AvgPool
from megactx.gist.compressors import build
from megactx.gist.substitution import Teacher, teach
from megactx.lm import BaseLM
from megactx.lm.layers import keys_values

from .tables import show, usable, write
from .trained import quiet

POINTS = 6  # columns of the table of residuals over steps
MEAN_OVER = 8  # batches that the constant state is the mean of
NOTES = [
    "residual = squared error to AvgPool's keys and values / that of one constant state, the mean of all blocks; mean"
    " over layers, keys and values, on held-out blocks: 1 is a constant, 0 is AvgPool.",
    "Without the shift the first layer keeps the gist token's own embedding: it has seen nothing, so at best 1.",
]


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
        self.teacher, self.starts = _read(base, batch)
        self.wanted = AvgPool(net.block_size, net.position).compress(base, self.teacher, self.starts)
        # In place of the variance of keys, which are rotated: a constant state has the rotation of every block's place.
        constant = [mean.expand(*self.starts.shape, -1) for mean in means]
        kept = keys_values(base.model.get_decoder(), constant, self.starts + net.offset)
        self.spread = squared_error(Slots(kept), self.wanted)

    def error(self, base: BaseLM, net: Compressor) -> Tensor:
        """[L, 2] of what the net keeps of these blocks."""
        return squared_error(net.compress(base, self.teacher, self.starts), self.wanted)


def squared_error(made: Slots, wanted: Slots) -> Tensor:
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
) -> dict:
    """Train every net on the same batches, each with its own optimizer.

    Args:
        nets: of one block size and position.
        batches: of training documents, without an end.
        held: held-out documents.
        steps, lr: of AdamW with a warm-up and a cosine.

    Returns:
        ``steps``: at which the residual was measured; ``residual``: name -> that many means over layers; ``layers``:
        name -> the last one by layer, ``[keys, values]``; ``parameters``: name -> how many are trained.
    """
    shown = sorted({round(steps * (index / (POINTS - 1)) ** 2) for index in range(POINTS)})  # denser at the beginning
    optimizers = {name: torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0) for name, net in nets.items()}
    leader = next(iter(nets.values()))
    means = mean_states(base, (batches[index] for index in range(MEAN_OVER)), leader.block_size)
    found = {0: measure(base, nets, held, means)}
    for step in bar("training")(range(1, steps + 1)):
        target = Target(base, batches[step - 1], leader, means)
        for name, net in nets.items():
            for group in optimizers[name].param_groups:
                group["lr"] = lr * warmup_cosine(step - 1, max(1, steps // 20), steps, 0.0)
            optimizers[name].zero_grad()
            (target.error(base, net) / target.spread).mean().backward()
            optimizers[name].step()
        if step in shown:
            found[step] = measure(base, nets, held, means)
    return {
        "steps": list(found),
        "residual": {name: [values[name].mean().item() for values in found.values()] for name in nets},
        "layers": {name: found[max(found)][name].tolist() for name in nets},
        "parameters": {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()},
    }


def _read(base: BaseLM, batch: dict) -> tuple[Teacher, Tensor]:
    ids, starts = (torch.as_tensor(batch[name]).to(base.model.device) for name in ("ids", "starts"))
    return teach(base, ids, with_states=True), starts.sort(dim=1).values


def _mean(teacher: Teacher, starts: Tensor, block: int) -> Tensor:
    return torch.stack([windows(states, starts, block).mean(dim=(0, 1, 2)) for states in teacher.states[:-1]])


def sheets(numbers: dict) -> list[Sheet]:
    """Residual over steps, and at the end by layer."""
    rows = [
        [name, f"{numbers['parameters'][name]:,}", *[f"{value:.3f}" for value in values]]
        for name, values in numbers["residual"].items()
    ]
    title = (
        f"can attention learn to pool: residual to AvgPool after so many steps ({numbers['base']}, blocks of"
        f" {numbers['block_size']}, {numbers['held']} held-out blocks)"
    )
    out = [Sheet(title, ["", "parameters", *map(str, numbers["steps"])], rows)]
    rows = [
        [name, what, *[f"{layer[index]:.3f}" for layer in layers]]
        for name, layers in numbers["layers"].items()
        for index, what in enumerate(("keys", "values"))
    ]
    layers = range(1, len(next(iter(numbers["layers"].values()))) + 1)
    return [
        *out,
        Sheet(f"by layer, after {numbers['steps'][-1]} steps", ["", "of", *map("layer {}".format, layers)], rows),
    ]


def rows_of(numbers: dict) -> list[dict]:
    """A row per compressor and step."""
    return [
        {"compressor": name, "step": step, "residual": value}
        for name, values in numbers["residual"].items()
        for step, value in zip(numbers["steps"], values, strict=True)
    ]


def study(asked: argparse.Namespace) -> dict:
    """Everything that was asked for, as plain numbers.

    Raises:
        ValueError: a setting that is not allowed, or no text that is long enough; the message names it.
    """
    for name in ("steps", "block_size", "tokens"):
        if getattr(asked, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(asked, name)} is not allowed: at least 1")
    if not asked.lr > 0:
        raise ValueError(f"--lr={asked.lr} is not allowed: above 0")
    quiet()
    torch.manual_seed(asked.seed)
    base = BaseLM.from_pretrained(asked.base, "float32").freeze()
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    nets = variants(base, asked.block_size, asked.only)
    source = Files(asked.path) if asked.path else Embedded()
    sizes = {"min_tokens": asked.tokens, "max_tokens": asked.tokens, "batch": 4, "spans": 16, "seed": asked.seed}
    sizes |= {"validation_documents": 24, "validation_blocks": 16, "weights": dict.fromkeys(DOMAINS)}
    data = SpanData(source, base.tokenizer, asked.block_size, 1, **sizes)
    data.limit_to(base.max_positions)
    data.setup()
    held = list(data.val_dataloader())
    about = {"base": asked.base, "block_size": asked.block_size, "lr": asked.lr, "seed": asked.seed, "text": asked.path}
    about["held"] = sum(batch["starts"].shape[1] for batch in held)
    return about | train(base, nets, data.training, held, asked.steps, asked.lr)


def command(asked: argparse.Namespace) -> None:
    """Train, measure, show and write."""
    stem = usable(asked.out) / "pooling_by_attention"
    numbers = study(asked)
    show(sheets(numbers), NOTES)
    write(stem, "Can attention learn to pool?", sheets(numbers), NOTES, rows_of(numbers), numbers)
    print(f"Residuals: {stem}.md, .csv and .json")


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m megactx.studies.pooling_by_attention", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--base", default="asset:tiny-base", help="the base LM (default asset:tiny-base)")
    parser.add_argument("--path", help="files to train on; one text in ten is held out; without it the embedded text")
    parser.add_argument("--only", nargs="+", metavar="OPTION", help="of the group compressor (default: all)")
    parser.add_argument("--steps", type=int, default=300, help="of 4 documents with 16 blocks each (default 300)")
    parser.add_argument("--lr", type=float, default=1e-2, help="of AdamW (default 0.01)")
    parser.add_argument("--block-size", type=int, default=32, help="K (default 32)")
    parser.add_argument("--tokens", type=int, default=544, help="of a document (default 544)")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation and sampling (default 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/pooling_by_attention"), help="folder for the tables")
    return run(command, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
