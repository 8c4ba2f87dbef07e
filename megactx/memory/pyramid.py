"""A working context read under one of three kinds of attention, MegaAttention's with its pyramid of summaries.

B rows, W entries, N columns of the pass, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megactx.lm import BaseLM
from megactx.lm.mega_attention import LEVELS, MegaMask, check_sizes, in_order, live_from

from .composite import Composite
from .passes import by_rows, by_segments
from .working_context import WorkingContext

ATTENTION = ("plain", "mega", "window")
LONG = 2048  # columns: from there on a reading without gradient goes in passes


@dataclass(frozen=True)
class Bend:
    """Positions of a history that is longer than the base LM takes: the sink keeps its own, the newest tokens keep
    their spacing, and what lies between is squeezed, to fractions. A place depends on its address alone, so no edit
    moves what stays.

    Args:
        top: position of the token behind the newest one when this was decided; half of all is for the newest.
        tokens: its address.
    """

    top: int
    tokens: int

    def __call__(self, address: Tensor, sink: int) -> Tensor:
        """Addresses, tokens of the sink -> positions in fp32, of the same shape."""
        newest = self.tokens - self.top // 2
        scale = (self.top - self.top // 2 - sink) / (newest - sink)
        squeezed = sink + (address.double() - sink) * scale
        behind = torch.where(address < newest, squeezed, (address - self.tokens + self.top).double())
        return torch.where(address < sink, address.double(), behind).float()


@dataclass(frozen=True)
class Pyramid:
    """The columns of a pass.

    ``lod`` and ``index`` [B, N] name their nodes, ``mask`` says who sees whom, ``leaves`` [B, W] where each entry of
    the working context stands.
    """

    context: WorkingContext
    lod: Tensor
    index: Tensor
    mask: MegaMask
    leaves: Tensor

    @classmethod
    def of(
        cls, context: WorkingContext, segment: int = 256, mid: int = 1024, live: int = 256, overlap: int = 0
    ) -> "Pyramid":
        """All summaries of the history that the working context stands for, levels 1 to 3, between its entries; and the
        strips before the segments of settled entries.

        Raises:
            ValueError: a size that is not allowed, as of ``MegaMask``; a window of several trees.
        """
        tree, ends = context.tree, context.ends()
        if isinstance(tree, Composite):
            raise ValueError("attention.kind=mega is not allowed with parts: its summaries are of one tree")
        lods, indices, there = [context.lods()], [context.index], [context.mask]
        for level in range(1, min(LEVELS, tree.depth) + 1):
            counts = ends // tree.block_size**level
            node = torch.arange(int(counts.max()), device=ends.device).expand(len(ends), -1)
            lods.append(torch.full_like(node, level))
            indices.append(node)
            there.append(node < counts[:, None])
        sizes = (tree.block_size, segment, mid, live, overlap)
        kinds = [torch.zeros_like(lods[0]), *(torch.ones_like(part) for part in lods[1:])]
        if overlap:
            entries = MegaMask(context.starts(), context.widths(), torch.zeros_like(there[0]), there[0], *sizes)
            for part, of_strips in zip((lods, indices, there), strips(context, entries), strict=True):
                part.append(of_strips)
            kinds.append(torch.full_like(lods[-1], 2))
        lod, index, there, kind = (torch.cat(part, dim=1) for part in (lods, indices, there, kinds))
        width = tree.block_size**lod
        order = in_order(index * width, width, kind == 1, there)
        lod, index, width, there, kind = (part.gather(1, order) for part in (lod, index, width, there, kind))
        summary, again = (kind == 1) & there, (kind == 2) & there if overlap else None
        mask = MegaMask(index * width, width, summary, there, *sizes, again)
        where = torch.argsort(order, dim=1)[:, : context.lods().shape[1]]
        return cls(context, lod, index, mask, where)

    def positions(self, bends: list[Bend | None] | None = None) -> Tensor:
        """Of each column [B, N]: a token's own, a gist's where its GistNet places it; 0 in the padding.

        Args:
            bends: of each row; ``None``, of one or all: the text's own positions.
        """
        encoder, block = self.context.tree.encoder, self.context.tree.block_size
        levels = range(1, max(LEVELS, self.context.tree.depth) + 1)  # leaves may be coarser than any summary
        offsets = torch.tensor([0, *(encoder.offset_in(block**n) for n in levels)])
        places = torch.where(self.mask.there, self.mask.start + offsets.to(self.lod.device)[self.lod], 0)
        if not bends or not any(bends):
            return places
        bent = [row.float() if bend is None else bend(row, block) for row, bend in zip(places, bends, strict=True)]
        return torch.where(self.mask.there, torch.stack(bent), 0.0)

    def to_tensor(self) -> Tensor:
        """The vectors that the base LM reads, [B, N, D]; 0 in the padding."""
        row, column = self.mask.there.nonzero().unbind(1)
        found = self.context.tree.embeddings(row, self.lod[row, column], self.index[row, column])
        b, n = self.lod.shape
        return found.new_zeros(b * n, found.shape[-1]).index_copy_(0, row * n + column, found).view(b, n, -1)

    def seen(self, summaries: bool = True) -> Tensor:
        """Which columns each row sees, bool [B, N, N]; without ``summaries`` nothing but themselves sees them."""
        dense = self.mask.dense()[:, 0]
        if summaries:
            return dense
        itself = torch.eye(dense.shape[-1], dtype=torch.bool, device=dense.device)
        return dense & (~self.mask.summary[:, None] | itself)

    def read(self, base: BaseLM, summaries: bool = True) -> Tensor:
        """-> final hidden states of the working context's entries [B, W, D], 0 in the padding.

        Where every leaf is live no summary is seen: that is the plain pass, bit for bit.

        Args:
            summaries: whether they are seen; without them far text is gone, which shows what they give.
        """
        context, mask = self.context, self.mask
        if (mask.is_live | mask.summary | ~mask.there).all():
            return PLAIN.read(base, context)
        if _in_passes(self.lod):
            return by_segments(self, base, summaries)
        sigma = context.tree.encoder.spread(self.lod)
        hidden = base(self.to_tensor(), self.positions(), self.seen(summaries)[:, None], sigma=sigma)
        hidden = hidden.gather(1, self.leaves[..., None].expand(-1, -1, hidden.shape[-1]))
        return torch.where(context.mask[..., None], hidden, 0.0)


def _in_passes(columns: Tensor) -> bool:
    """Whether reading columns [B, N] at once would cost more, or more memory than there is."""
    return not torch.is_grad_enabled() and columns.shape[1] >= LONG


def strips(context: WorkingContext, entries: MegaMask) -> tuple[Tensor, Tensor, Tensor]:
    """What stands before the segments of a window's settled entries, by blocks: the tokens of a block that the window
    shows in tokens, else its gist. The sink is in no strip.

    Args:
        entries: the window's entries without anything else.

    Returns:
        LOD and index of each row of a strip, and whether it is anything, [B, M] each.
    """
    k, found = context.tree.block_size, []
    settled, segments = entries.leaf & ~entries.is_live, entries.segments()
    for row, end in enumerate(context.ends().tolist()):
        borders = segments[row, settled[row]].unique()
        blocks = (borders[borders > 0, None] - entries.overlap) // k
        blocks = (blocks + torch.arange(entries.overlap // k, device=borders.device)).flatten()
        blocks = blocks[blocks > 0]
        raw = torch.zeros(end // k + 1, dtype=torch.bool, device=borders.device)
        raw[context.index[row, context.mask[row] & (context.lods()[row] == 0)] // k] = True
        tokens = (blocks[raw[blocks], None] * k + torch.arange(k, device=borders.device)).flatten()
        gists = blocks[~raw[blocks]]
        lod = torch.cat([torch.zeros_like(tokens), torch.ones_like(gists)])
        found.append((lod, torch.cat([tokens, gists]), torch.ones_like(lod, dtype=torch.bool)))
    return tuple(pad_sequence(part, batch_first=True) for part in zip(*found, strict=True))


@dataclass(frozen=True)
class Attention:
    """How a working context is read.

    Args:
        kind: ``plain``: every entry sees all before it; ``mega``: ``MegaMask``; ``window``: the sink and the newest
            ``window`` tokens before it, the control that has no memory.
        segment, mid, live, overlap: of ``mega``, see ``MegaMask``.
        window: of ``window``, tokens.
        summaries: of ``mega``, whether its gists are seen.

    Raises:
        ValueError: an unknown kind, or a window that is not positive.
    """

    kind: str = "plain"
    segment: int = 256
    mid: int = 1024
    live: int = 256
    window: int = 512
    summaries: bool = True
    overlap: int = 0

    def __post_init__(self):
        if self.kind not in ATTENTION:
            raise ValueError(f"attention.kind={self.kind} is not known, allowed are {', '.join(ATTENTION)}")
        if self.window < 1:
            raise ValueError(f"attention.window={self.window} is not allowed: at least 1")

    def check(self, block_size: int) -> "Attention":
        """Itself, where its sizes fit blocks of ``block_size`` tokens.

        Raises:
            ValueError: they do not, see ``MegaMask``.
        """
        if self.kind == "mega":
            check_sizes(block_size, self.segment, self.mid, self.live, self.overlap)
        return self

    def read(self, base: BaseLM, context: WorkingContext) -> Tensor:
        """-> final hidden states of the entries [B, W, D], 0 in the padding."""
        if self.kind == "mega":
            return self.pyramid(context).read(base, self.summaries)
        sigma = context.tree.encoder.spread(context.lods())
        if self.kind == "plain":
            return base.read(context.to_tensor(), context.positions(), context.lengths, sigma)
        if _in_passes(context.lod):
            return by_rows(context, base, self.window)
        hidden = base(context.to_tensor(), context.positions(), self.near(context)[:, None], sigma=sigma)
        return torch.where(context.mask[..., None], hidden, 0.0)

    def live_from(self, tokens):
        """From which token of a text on a row sees every leaf before it and no summary.

        Args:
            tokens: of the text, a number or an array of any kind.

        Raises:
            ValueError: there is no such token, with ``window``.
        """
        if self.kind == "window":
            raise ValueError(
                "attention.kind=window is not allowed here: many branches behind one document are read in one pass, in"
                " which each row would need a window of its own; allowed are plain and mega"
            )
        return tokens * 0 if self.kind == "plain" else live_from(tokens, self.segment, self.live)

    def pyramid(self, context: WorkingContext) -> Pyramid:
        return Pyramid.of(context, self.segment, self.mid, self.live, self.overlap)

    def pairs(self, context: WorkingContext) -> Tensor:
        """Share of the pairs of plain attention over the same entries that are seen, [B]."""
        if self.kind == "mega":
            return self.pyramid(context).mask.pairs()
        count = context.lengths
        if self.kind == "plain":
            return torch.ones_like(count, dtype=torch.float)
        parts = torch.arange(context.lod.shape[1], device=context.lod.device).split(LONG)
        seen = sum((self.near(context, some) & context.mask[:, some, None]).sum((1, 2)) for some in parts)
        return seen / (count * (count + 1) / 2)

    def near(self, context: WorkingContext, rows: Tensor | None = None) -> Tensor:
        """The mask of ``window`` over a working context, bool [B, R, W]; padding sees itself.

        Args:
            rows: those that are wanted [R]; ``None``: all W.
        """
        start, end, there = context.starts(), context.starts() + context.widths(), context.mask
        at = torch.arange(start.shape[1], device=start.device)
        rows = at if rows is None else rows
        near = (end[:, None] > start[:, rows, None] - self.window + 1) | (end <= context.tree.block_size)[:, None]
        causal = at <= rows[:, None]
        return near & causal & there[:, None] & there[:, rows, None] | (at == rows[:, None])


PLAIN = Attention()
