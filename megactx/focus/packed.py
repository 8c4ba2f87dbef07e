"""What many windows of one document cost, in one packed pass, with gradients into gists and base LM (method 12).

    window 1   [ tokens and gists ] y0 y1 ... y(H-2)         read together, each row on its own
    window 2   [ tokens and gists ] y0 y1 ... y(H-2)
    scored                        y0 y1 ... y(H-1)

The gists of a tree were computed without a gradient. So the gists that the windows show are made again, with a
gradient, each once however many windows show it. The windows read these.

N windows, W entries, M gists that are shown, H scored tokens, K children of a node, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megactx.gist import GistNet
from megactx.lm import BaseLM
from megactx.lm.chunked_head import score
from megactx.lm.prefill import Prefill
from megactx.memory import WorkingContext
from megactx.memory.pyramid import PLAIN, Attention

from .attended_rows import AttendedRows
from .window_rows import lay_out

ENCODED = 64  # blocks that are encoded at once
LOD = 2**40  # a node as one number: lod x this + index


@dataclass(frozen=True)
class Windows:
    """Windows of one document as plain tensors, and which gists they show."""

    ids: Tensor  # [N, W], of the raw entries
    place: Tensor  # [N, W], of each gist in the table of all gists; -1 where an entry is no gist
    positions: Tensor  # [N, W]
    lods: Tensor  # [N, W]
    lengths: Tensor  # [N]
    ends: Tensor  # [N]
    nodes: dict[int, Tensor]  # level -> index [M]; the table of gists goes level by level
    attended: AttendedRows | None = None  # how another attention than plain reads them

    def __getitem__(self, which: slice | Tensor) -> "Windows":
        parts = (self.ids, self.place, self.positions, self.lods, self.lengths, self.ends)
        attended = None if self.attended is None else self.attended[which]
        return Windows(*(part[which] for part in parts), self.nodes, attended)

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, context: WorkingContext, attention: Attention = PLAIN) -> "Windows":
        """Of working contexts whose rows are all windows of the same text, and the attention that they are read with.

        Summaries of MegaAttention are gists as the tree keeps them: no gradient goes into these.
        """
        lod, index, tree = context.lod, context.index, context.tree
        gist, raw = context.mask & (lod > 0), context.mask & (lod == 0)
        shown, order = torch.unique(lod[gist] * LOD + index[gist], return_inverse=True)
        place = torch.full_like(lod, -1)
        place[gist] = order
        row, column = raw.nonzero().unbind(1)
        ids = torch.zeros_like(lod)
        ids[raw] = tree.levels[0].read("token", row, index[row, column]).long()
        nodes = {lod: shown[shown // LOD == lod] % LOD for lod in (shown // LOD).unique().tolist()}
        attended = AttendedRows.of(attention, context)
        return cls(ids, place, context.positions(), lod, context.lengths, context.ends(), nodes, attended)

    def read(self, base: BaseLM, gists: Tensor, following: Tensor, encoder) -> Tensor:
        """Hidden states that predict following [H]: [N, H, D]."""
        raw = base.embed(self.ids)
        shown = gists[self.place.clamp(min=0)].to(raw.dtype) if len(gists) else raw
        entries = torch.where((self.place >= 0)[..., None], shown, raw)
        if self.attended is not None:
            return self.attended.read(base, following.expand(len(self), -1), entries)
        sizes = (self.positions, self.lods, self.lengths, self.ends)
        rows = lay_out(base, entries, *sizes, following.expand(len(self), -1), encoder)
        return rows.scored(rows.read(base))


def unique_windows(context: WorkingContext) -> tuple[Tensor, Tensor]:
    """Find equal rows, to read them once: -> (the first row of each kind [U], the kind 0 to U - 1 of each row [N])."""
    rows = torch.cat([torch.where(context.mask, values, -1) for values in (context.lod, context.index)], dim=1)
    _, kind = torch.unique(rows, dim=0, return_inverse=True)
    order = torch.arange(len(kind), device=kind.device)
    first = torch.full_like(kind, len(kind)).scatter_reduce(0, kind, order, "amin")[: int(kind.max()) + 1]
    first, rank = first.sort()
    return first, rank.argsort()[kind]


def encode_shown(net: GistNet, base: BaseLM, prefill: Prefill, nodes: dict[int, Tensor], recompute: bool) -> Tensor:
    """The gists of nodes of one document, with gradient: [M, D], LOD by LOD.

    Args:
        prefill: of the document; ``unread`` is enough for a GistNet that reads embeddings.
        recompute: keep no activations, compute them again during backward.
    """
    found = [torch.empty(0, net.width, device=prefill.ids.device)]
    for lod, index in nodes.items():
        starts = index[None] * net.block_size**lod

        def encoded(starts: Tensor, lod: int = lod) -> Tensor:
            return net.compress(base, prefill, starts, lod).vectors[0]

        for part in starts.split(max(1, ENCODED // net.block_size ** (lod - 1)), dim=1):
            found.append(checkpoint(encoded, part, use_reentrant=False) if recompute else encoded(part))
    return torch.cat(found)


def continuation_loss(
    base: BaseLM, hidden: Tensor, full: Tensor, targets: Tensor, objective: str, reference: BaseLM | None = None
) -> tuple[Tensor, Tensor]:
    """Scores of the tokens that follow, behind each window: (loss [N, H] with gradient, NLL [N, H]), in nats.

    Args:
        hidden: of ``Windows.read``, [N, H, D].
        full: hidden states of the untouched base LM over the whole document, [H, D].
        targets: [H].
        objective: ``kl`` or ``delta_nll``.
        reference: the untouched base LM, if it has another head. The head of ``base`` then takes a gradient.
    """
    loss, numbers = score(base, hidden, full, targets, objective, reference)
    return loss, numbers["nll"]


def accumulated(
    run: Callable[..., tuple[Tensor, Tensor]], parts: Sequence, shared: Tensor, modules: Sequence[nn.Module]
) -> tuple[Tensor, Tensor]:
    """A loss over parts, one after the other, with the activations of one part at a time in memory.

    Gradients are those of the sum over all parts, and no part is computed twice. Each part's gradient is taken as soon
    as its loss is known, and kept until backward asks for that of the sum.

    Args:
        run: ``(part, shared) -> (loss, a scalar with gradient; numbers [n, ...])``.
        parts: of whatever ``run`` takes.
        shared: a tensor that all parts read. Backward goes through the graph that made it once.
        modules: ``run`` uses their parameters; parameters that train get a gradient.

    Returns:
        The sum of the losses, and the numbers of all parts [N, ...], without gradient.
    """
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    return _Accumulated.apply(run, parts, shared, *trained)


class _Accumulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, parts, shared, *trained):
        total, numbers, gradients = 0.0, [], [None] * (1 + len(trained))
        needed = torch.tensor(ctx.needs_input_grad[2:]).any()
        for part in parts:
            with torch.set_grad_enabled(bool(needed)):
                own = shared.detach().requires_grad_(bool(needed))
                loss, found = run(part, own)
                if needed:
                    now = torch.autograd.grad(loss, [own, *trained], allow_unused=True)
                    gradients = [_sum(a, b) for a, b in zip(gradients, now, strict=True)]
            total = total + loss.detach()
            numbers.append(found.detach())
        ctx.gradients, numbers = gradients, torch.cat(numbers)
        ctx.mark_non_differentiable(numbers)
        return total, numbers

    @staticmethod
    def backward(ctx, outer, _):
        return None, None, *(None if g is None else g * outer for g in ctx.gradients)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
