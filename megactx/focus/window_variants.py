"""Different windows of one document, edits of them, and what LensNet learns from the good edits (method 12).

    sources     N1 windows: the cold start, and random ones
    variants    N2 / N1 of each: the source itself, what LensNet and the allocator make of it, a random change of it

    WC* = argmin over the variants of a source of  L + lambda x distance        what LensNet should have chosen

L is the measured loss of the variant, in nats per token. The distance is the swap rate: the fine entries that edits
create or remove, over all entries of the source.

N1 sources, N2 variants, W entries, E edits, K children of a node, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from megactx.gist import GistNet
from megactx.lm import BaseLM
from megactx.lm.prefill import Prefill
from megactx.memory import MegaContextTree, WorkingContext

from .allocator import FocusAllocator
from .edits import Edits, moves
from .label_files import LensBatch
from .lensnet import LensNet, masked
from .mean_embeddings import window_mean_embeddings
from .objectives import value_loss
from .packed import ENCODED
from .price import price, signed_scores
from .sampling import draw, one_per_row

TEMPERATURE = 0.1  # at which edits are drawn, in units of the score


@dataclass(frozen=True)
class WindowVariants:
    """Sources, their variants, and the edits between them."""

    sources: WorkingContext  # N1 rows
    context: WorkingContext  # N2 rows; those of source r begin at row r x N2 / N1
    edits: Edits  # by row of ``context``
    batch: LensBatch  # LensNet's view of the sources and of all edits, whose values are not known yet

    @property
    def each(self) -> int:
        """Variants of a source, the source itself among them."""
        return len(self.context.counts) // len(self.sources.counts)


@torch.no_grad()
def same_rows(net: GistNet, base: BaseLM, prefill: Prefill, *rows: int) -> tuple[MegaContextTree, ...]:
    """A tree for each number of ``rows``, with one document in all of its rows. The gists are made once.

    Args:
        prefill: of the document, ids [1, C]; ``unread`` is enough for a GistNet that reads embeddings.
    """
    ids, k = prefill.ids, net.block_size
    starts, training = torch.arange(0, ids.shape[1] // k * k, k, device=ids.device)[None], net.training
    net.eval()
    gists = torch.cat([net.compress(base, prefill, part).vectors for part in starts.split(ENCODED, dim=1)], dim=1)
    trees = tuple(MegaContextTree(net, base, rows=count, device=ids.device) for count in rows)
    for tree in trees:
        tree.append(ids.expand(tree.rows, -1), gists=gists.expand(tree.rows, -1, -1))
    net.train(training)
    return trees


def make_variants(
    trees: tuple[MegaContextTree, MegaContextTree], budget: int, lens: LensNet, allocator: dict, generator: Generator
) -> WindowVariants:
    """Draw sources, and edit them.

    Args:
        trees: of one document, with N1 and with N2 rows.
        budget: the most entries of a window.
        allocator: keyword arguments of ``FocusAllocator``, which draws its edits by their scores.
        generator: of all choices, on the CPU.

    Raises:
        ValueError: the budget is too small for the document.
    """
    few, many = trees
    each = many.rows // few.rows
    sources = _sources(few, budget, generator)
    legal = moves(sources, allocator.get("protected", 128))
    seed = int(torch.randint(2**31, (), generator=generator))
    allocator = FocusAllocator(**allocator | {"temperature": TEMPERATURE, "cooldown": 0, "seed": seed})
    batch = _batch(sources, legal)
    with torch.no_grad():
        values = lens(batch.embeddings, batch.lods, batch.distance, batch.mask, batch.mean_embeddings)
        down, keep = masked(values, legal)
        slack, margin = sources.budget - sources.lengths, allocator.margin(lens.tau)
        now = price(down, keep, legal, slack, few.block_size, margin)
        scores = signed_scores(down, keep, legal, now, lens.tau)
    parts = (part.repeat_interleave(each, 0) for part in (sources.lod, sources.index, sources.counts))
    context = WorkingContext(many, *parts, budget)
    edits = allocator.propose(context, scores.repeat_interleave(each, 0), now.repeat_interleave(each))
    number = torch.arange(many.rows, device=edits.row.device) % each
    random = (number == each - 1) & (each > 2) | (torch.bincount(edits.row, minlength=many.rows) == 0)
    edits = edits[(number[edits.row] > 0) & ~random[edits.row]]
    edits = _joined(edits, _random(context, random & (number > 0), allocator.protected, generator))
    # Gists that are expanded and siblings that are collapsed all stand in the source, so LensNet's values are found
    # there.
    batch = _batch(sources, legal, edits, edits.row // each)
    edits.apply(context)
    return WindowVariants(sources, context, edits, batch)


def focus_losses(
    lens: LensNet, variants: WindowVariants, nll: Tensor, weight: float, choice: float
) -> dict[str, Tensor]:
    """Losses of LensNet's values of the edits, once each variant is measured.

    Args:
        nll: of each variant, [N2] nats per token.
        weight: lambda, of the distance.
        choice: weight of the choice beside the values.

    Returns:
        ``choice``: cross-entropy of WC* among the variants of each source. ``huber``: ``value_loss`` of the sum of a
        variant's values against what its edits gained together. ``loss``: their weighted sum. ``gained``, without
        gradient: nats by which WC* is better than its source.
    """
    batch, each, rows = variants.batch, variants.each, len(nll)
    values = lens(batch.embeddings, batch.lods, batch.distance, batch.mask, batch.mean_embeddings)
    worth = batch.estimates(values, lens.block_size)
    # An expand gains what its detail is worth, a collapse loses it.
    worth = torch.where(batch.expand, worth, -worth)
    expected = torch.zeros(rows, device=nll.device).index_add(0, variants.edits.row, worth)
    count = torch.bincount(variants.edits.row, minlength=rows)
    entries = variants.sources.lengths.repeat_interleave(each)
    distance = weight * lens.block_size * count / entries
    measured = nll.view(-1, each)[:, :1].repeat_interleave(each, 1).flatten() - nll
    edited = count > 0
    lens.see(measured[edited] / count[edited])
    tau = lens.tau.clone()  # the next document of the step changes it before backward of this one
    best = (nll + distance).view(-1, each).argmin(1)
    chosen = F.cross_entropy(((expected - distance) / tau).view(-1, each), best)
    huber = value_loss(expected, measured)
    gained = measured.view(-1, each).gather(1, best[:, None]).mean()
    return {"huber": huber, "choice": chosen, "loss": huber + choice * chosen, "gained": gained}


def _sources(tree: MegaContextTree, budget: int, generator: Generator) -> WorkingContext:
    """The cold start in the first row, random windows in the others."""
    first, others = WorkingContext.recency(tree, budget), draw("random", tree, budget, generator)
    width = max(first.lod.shape[1], others.lod.shape[1])
    lod, index = (
        torch.cat([F.pad(a, (0, width - a.shape[1]))[:1], F.pad(b, (0, width - b.shape[1]))[1:]])
        for a, b in ((first.lod, others.lod), (first.index, others.index))
    )
    return WorkingContext(tree, lod, index, torch.cat([first.counts[:1], others.counts[1:]]), budget)


def _random(context: WorkingContext, rows: Tensor, protected: int, generator: Generator) -> Edits:
    """A random expand in each of the rows, bool [N]. Where it does not fit, a collapse of raw tokens comes first."""
    legal, k = moves(context, protected).edits(context), context.tree.block_size
    legal = legal[rows[legal.row]]
    expands = one_per_row(legal[legal.expand], generator)
    full = context.lengths + k - 1 > context.budget
    collapses = one_per_row(legal[~legal.expand & (legal.lod == 1) & full[legal.row]], generator)
    paid = ~full
    paid[collapses.row] = True
    return _joined(collapses, expands[paid[expands.row]])


def _joined(first: Edits, second: Edits) -> Edits:
    names = ("row", "lod", "index", "expand")
    return Edits(*(torch.cat([getattr(first, name), getattr(second, name)]) for name in names))


@torch.no_grad()
def _batch(context: WorkingContext, legal, edits: Edits | None = None, row: Tensor | None = None) -> LensBatch:
    from .edits import column_of

    nothing = torch.empty(0, dtype=torch.long, device=context.lod.device)
    column, expand = nothing, nothing.bool()
    if edits is not None:
        first = torch.where(edits.expand, edits.index, edits.index * context.tree.block_size)
        column = column_of(context, row, edits.lod - (~edits.expand).long(), first)
        expand = edits.expand
    return LensBatch(
        embeddings=context.to_tensor(),
        lods=context.lods(),
        distance=context.ends()[:, None] - context.positions(),
        mask=context.mask,
        mean_embeddings=window_mean_embeddings(context),
        legal=legal,
        row=nothing if row is None else row,
        column=column,
        expand=expand,
        labels=nothing.float(),
    )
