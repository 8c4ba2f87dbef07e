"""What reading under MegaAttention costs: NLL against full attention, beside a sliding window that sees as many pairs.

    python -m megactx.studies.mega_attention --path TEXTS              with the embedded base, not trained for it
    python -m megactx.studies.mega_attention smollm2 --tokens 4096 --documents 12 --mid 512
    python -m megactx.studies.mega_attention --trained RUN [RUN ...]   with the adapters of runs

Runs are those of ``experiment=mega_attention``. Every document is read raw under each mask: all that is told of a far
token is its gist. The mask without its summaries says what the gists give, a window with a sink what they must beat.
The first run, or the untrained mask, is compared with all others on the same tokens.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from megactx.evaluation.attention import FULL, Costs, raw
from megactx.evaluation.table import Report
from megactx.framework.bar import bar
from megactx.memory import MegaContextTree
from megactx.memory.pyramid import PLAIN, Attention
from megactx.parts.models import load_models
from megactx.stages.attention import AttentionStage

from .study import Options, command, usable
from .trained import checkpoint_of, device, held_out

EVERY = 10**6  # blocks: of all documents


def options(given: Options) -> None:
    about = "base and GistNet: an asset, an exported folder, a run; without it the embedded ones"
    given.add("model", nargs="?", metavar="MODEL", help=about)
    given.path()
    given.add("--trained", nargs="+", metavar="RUN", help="runs of experiment=mega_attention; the first has the sizes")
    given.number("tokens", 2048, "of a document", least=64)
    given.number("documents", 24, "documents", least=2)
    given.number("segment", 256, "tokens of a segment of settled rows")
    given.number("mid", 1024, "tokens before a segment that gists of level 1 cover")
    given.number("live", 256, "newest tokens that see every token", least=0)
    given.number("overlap", 0, "tokens of the strip before a segment", least=0)
    given.add("--out", type=Path, default=Path("mega_attention"), help="folder of the tables")


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """Measure all ways of reading on the same documents.

    Raises:
        ValueError: a size that is not allowed, a model without a GistNet, or no text that is long enough.
    """
    stem = usable(args.out) / "mega_attention"
    runs = {Path(run).name or run: trained(run) for run in args.trained or []}
    if runs and args.model:
        raise ValueError(f"MODEL={args.model} is not allowed with --trained: runs name their own base")
    if runs:
        first = next(iter(runs.values()))
        base, net, mega = first.base, first.gistnet, replace(first.attention, kind="mega")
        names = {run.hparams.base["name"] for run in runs.values()}
        if len(names) > 1:
            raise ValueError(f"--trained: the runs have different base LMs: {', '.join(sorted(names))}")
    else:
        models = load_models(args.model, setting="MODEL")
        base, net = models.base, models.gistnet
        mega = Attention("mega", args.segment, args.mid, args.live, overlap=args.overlap)
    if net is None:
        raise ValueError(f"MODEL={args.model}: there is no GistNet for it")
    batches = held_out(base, args.path, net.block_size, 1, args.tokens, EVERY)[: args.documents]
    context = raw(tree_of(batches[0], base, net, first if runs else None))
    window = Attention("window", window=window_of(mega.pairs(context).item(), args.tokens, net.block_size))
    arms = {FULL: (PLAIN, reader(PLAIN, base, first if runs else None))}
    for name, run in runs.items():
        label = f"{name}: {run.attention.kind}, trained"
        arms[label] = (run.attention, lambda context, run=run: run.attention.read(run.base, context))
    untrained = {"mega": mega, "mega without gists": replace(mega, summaries=False)}
    for name, attention in (untrained | {f"sink and {window.window} tokens": window}).items():
        arms[name] = (attention, reader(attention, base, first if runs else None))
    costs = Costs(base, arms, mega)
    about = {"model": args.model, "trained": args.trained, "text": args.path, "attention": asdict(mega)}
    trees = (tree_of(batch, base, net, first if runs else None) for batch in bar("documents")(batches))
    for _ in costs.measure(trees):
        yield stem, costs.report("MegaAttention", about)


def trained(folder: str) -> AttentionStage:
    """A run of the attention stage from its best checkpoint, in fp32.

    Raises:
        ValueError: there is none.
    """
    path, checkpoint = checkpoint_of(Path(folder))
    if "attention" not in checkpoint["hyper_parameters"]:
        raise ValueError(f"--trained={folder}: it is no run of experiment=mega_attention")
    stage = AttentionStage.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    stage.set_dtype(torch.float32)
    return stage.to(device()).eval()


def tree_of(batch: dict, base, net, run: AttentionStage | None) -> MegaContextTree:
    ids = batch["ids"].to(base.model.device)
    with torch.no_grad():
        return run.window(ids).tree if run else MegaContextTree.from_tokens(ids, net.eval(), base)


def reader(attention: Attention, base, run: AttentionStage | None):
    """Reads without adapters."""
    return (lambda context: run.untrained(attention, context)) if run else (lambda c: attention.read(base, c))


def window_of(share: float, tokens: int, sink: int) -> int:
    """Tokens of a sliding window that sees, with the sink, about as many pairs as this share of a causal pass."""
    at = torch.arange(1, tokens + 1)

    def pairs(wide: int) -> int:
        return int(torch.minimum(at, at.clamp(max=wide) + (at - wide).clamp(0, sink)).sum())

    wanted, low, high = share * tokens * (tokens + 1) / 2, 1, tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if pairs(middle) >= wanted else (middle + 1, high)
    return low


main = command("mega_attention", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
