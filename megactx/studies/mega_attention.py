"""What reading under MegaAttention costs: NLL against full attention, beside a sliding window that sees as many pairs.

    python -m megactx.studies.mega_attention --path TEXTS                with the embedded base
    python -m megactx.studies.mega_attention smollm2 --tokens 4096 --documents 12 --mid 512

The base was not trained to read so. Every document is read raw under each mask: all that is told of a far token is its
gist. The mask without its summaries says what the gists give, a window with a sink what they must beat.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.evaluation.bootstrap import mean_interval
from megactx.evaluation.table import Report, Table, cell, pivot
from megactx.framework.bar import bar
from megactx.lm import BaseLM, masks
from megactx.memory import MegaContextTree, WorkingContext
from megactx.memory.pyramid import Pyramid
from megactx.parts.models import load_models

from .study import Options, command, usable
from .trained import held_out

FULL, MEGA, BLIND, WINDOW = "full attention", "mega", "mega without gists", "window and sink"
SPANS = ("settled", "live")
EVERY = 10**6  # blocks: of all documents
CHUNK = 256  # rows whose logits are held at once
LEGEND = (
    "dNLL = NLL less that of full attention, nats per token; brackets: 95 %, bootstrap over documents. settled: rows"
    " that see the sink, gists of what is far and their own segment; live: the newest rows, which see every token."
    " Pairs: seen ones, as a share of those of full attention."
)


def options(given: Options) -> None:
    about = "base and GistNet: an asset, an exported folder, a run; without it the embedded ones"
    given.add("model", nargs="?", metavar="MODEL", help=about)
    given.path()
    given.number("tokens", 2048, "of a document", least=64)
    given.number("documents", 24, "documents", least=2)
    given.number("segment", 256, "tokens of a segment of settled rows")
    given.number("mid", 1024, "tokens before a segment that gists of level 1 cover")
    given.number("live", 256, "newest tokens that see every token")
    given.add("--out", type=Path, default=Path("mega_attention"), help="folder of the tables")


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """Measure all four masks on the same documents.

    Raises:
        ValueError: a size that is not allowed, a model without a GistNet, or no text that is long enough.
    """
    stem = usable(args.out) / "mega_attention"
    models = load_models(args.model)
    base, net = models.base, models.gistnet
    if net is None:
        raise ValueError(f"MODEL={args.model}: there is no GistNet for it")
    batches = held_out(base, args.path, net.block_size, 1, args.tokens, EVERY)[: args.documents]
    sizes = {"segment": args.segment, "mid": args.mid, "live": args.live}
    rows, shares, seconds, wide = [], [], {}, None
    for number, batch in enumerate(bar("documents")(batches)):
        tree = MegaContextTree.from_tokens(batch["ids"].to(base.model.device), net.eval(), base)
        ids = tree.tokens.long()
        raw = torch.arange(ids.shape[1], device=ids.device)[None]
        context = WorkingContext(tree, torch.zeros_like(raw), raw, [ids.shape[1]], ids.shape[1])
        pyramid = Pyramid.of(context, **sizes)
        share = pyramid.mask.pairs().item()
        wide = wide or window_of(share, ids.shape[1], net.block_size)
        live = pyramid.mask.is_live.gather(1, pyramid.leaves)[0, :-1]
        for name, read in arms(base, pyramid, wide).items():
            begin = time.perf_counter()
            hidden = read()
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin
            loss = nll(base, hidden, ids)
            rows.append((number, name, loss, live))
        shares.append(share)
        yield stem, report_of(rows, sum(shares) / len(shares), wide, seconds, args)


def arms(base: BaseLM, pyramid: Pyramid, wide: int) -> dict[str, Callable[[], Tensor]]:
    """name -> a pass over the document under that mask, -> hidden [1, T, D]."""
    context = pyramid.context
    vectors, positions = context.to_tensor(), context.positions()
    dense = pyramid.mask.dense()
    n, t = dense.shape[-1], vectors.shape[1]
    blind = dense & (~pyramid.mask.summary[:, None, None] | torch.eye(n, dtype=torch.bool, device=dense.device))
    at = torch.arange(t, device=dense.device)
    near = masks.causal(t, dense.device) & ((at[:, None] - at < wide) | (at < context.tree.block_size))

    def under(mask: Tensor) -> Tensor:
        hidden = base(pyramid.to_tensor(), pyramid.positions(), mask, sigma=context.tree.encoder.spread(pyramid.lod))
        return hidden.gather(1, pyramid.leaves[..., None].expand(-1, -1, hidden.shape[-1]))

    return {
        FULL: lambda: base.read(vectors, positions, context.lengths),
        MEGA: lambda: under(dense),
        BLIND: lambda: under(blind),
        WINDOW: lambda: base(vectors, positions, near),
    }


def window_of(share: float, tokens: int, sink: int) -> int:
    """Tokens of a sliding window that sees, with the sink, about as many pairs as this share of a causal pass."""

    def pairs(wide: int) -> int:
        at = torch.arange(1, tokens + 1)
        return int(torch.minimum(at, at.clamp(max=wide) + (at - wide).clamp(0, sink)).sum())

    wanted, low, high = share * tokens * (tokens + 1) / 2, 1, tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if pairs(middle) >= wanted else (middle + 1, high)
    return low


@torch.no_grad()
def nll(base: BaseLM, hidden: Tensor, ids: Tensor) -> Tensor:
    """Hidden states [1, T, D], ids [1, T] -> NLL of each next token, [T - 1] on the CPU."""
    found = []
    for first in range(0, ids.shape[1] - 1, CHUNK):
        last = min(first + CHUNK, ids.shape[1] - 1)
        logits = base.logits(hidden[0, first:last]).float()
        found.append(F.cross_entropy(logits, ids[0, first + 1 : last + 1], reduction="none").cpu())
    return torch.cat(found)


def report_of(rows: list, share: float, wide: int, seconds: dict[str, float], args) -> Report:
    """(document, mask, NLL [T - 1], live [T - 1]) per document and mask -> tables."""
    table, names = Table(), list(seconds)
    full = {number: loss for number, name, loss, _ in rows if name == FULL}
    documents = len(full)
    for name in names:
        mine = [(number, loss, live.cpu()) for number, other, loss, live in rows if other == name]
        for span in SPANS:
            chosen = [(number, loss, live if span == "live" else ~live) for number, loss, live in mine]
            owner = torch.cat([torch.full((int(kept.sum()),), number) for number, _, kept in chosen])
            if not len(owner):
                continue
            about = {"carrier": name, "span": span, "n": documents}
            table.add("nll", torch.cat([loss[kept] for _, loss, kept in chosen]).mean().item(), **about)
            lost = torch.cat([(loss - full[number])[kept] for number, loss, kept in chosen])
            table.add("dnll", mean_interval(owner, lost), **about)
            if name == MEGA:
                for rival in (BLIND, WINDOW):
                    other = {number: loss for number, its, loss, _ in rows if its == rival}
                    if other.keys() == full.keys():
                        less = torch.cat([(loss - other[number])[kept] for number, loss, kept in chosen])
                        table.add(f"less than {rival}", mean_interval(owner, less), **about)
        table.add("seconds", seconds[name] / documents, carrier=name)
        table.add("pairs", 1.0 if name == FULL else share, carrier=name)
    columns = [(f"NLL, {span}", {"metric": "nll", "span": span}, ".3f") for span in SPANS]
    columns += [(f"dNLL, {span}", {"metric": "dnll", "span": span}, lambda row: cell(row, "+.3f")) for span in SPANS]
    columns += [("pairs", {"metric": "pairs"}, ".0%"), ("seconds", {"metric": "seconds"}, ".2f")]
    against = [(span, {"span": span}, lambda row: cell(row, "+.3f")) for span in SPANS]
    rivals = [f"less than {rival}" for rival in (BLIND, WINDOW)]
    title = f"{documents} documents of {args.tokens:,} tokens; the window has {wide} tokens"
    return Report(
        "MegaAttention, not trained for",
        table,
        [
            pivot(title, table, columns, heading="mask", strong=[MEGA]),
            pivot("mega, paired", table, against, "metric", "", rivals),
        ],
        LEGEND,
        about={name: str(value) for name, value in vars(args).items()},
    )


main = command("mega_attention", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
