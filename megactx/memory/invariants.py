"""The eight invariants of a working context, from lod and index alone: what the class derives is checked, not used."""

import torch
from torch import Tensor

from .composite import Composite


def violations(context) -> list[str]:
    """The invariants that do not hold, in words; each names the first row that breaks it. Empty where all is well."""
    tree, lod, index = context.tree, context.lod, context.index
    k, (b, w), levels = tree.block_size, lod.shape, range(tree.depth + 1)
    device = lod.device
    mask = torch.arange(w, device=device) < context.counts.to(device)[:, None]
    row = torch.arange(b, device=device)[:, None].expand(b, w)
    wrong = []

    def claim(holds: Tensor, name: str, what: str) -> bool:  # holds [B, ...]
        if not (each := holds.reshape(b, -1).all(1)).all():
            wrong.append(f"{name}: row {each.tolist().index(False)} {what}")
        return bool(each.all())

    claim(context.counts <= context.budget, "budget", f"has more than {context.budget} entries")
    known = (lod >= 0) & (lod <= tree.depth) & (index >= 0)
    if not claim(known | ~mask, "tree", "has entries of levels that the tree has not"):
        return wrong
    usable = tree.usable(row[mask], lod[mask], index[mask])
    may = torch.ones_like(mask).masked_scatter(mask, usable)
    claim(may, "tree", "has entries that are not in the tree, hold block 0 or are protected")

    width = torch.tensor([k**n for n in levels], device=device)[lod] * mask
    start, end = index * width, width.cumsum(1)
    whole = width.sum(1)
    # Parts of a composite lie apart: there tokens are counted through, and what lies apart is not one block.
    claim(
        (tree.rank(start) == end - width) | ~mask,
        "contiguity",
        "has an entry that does not begin where the last one ends",
    )
    claim(whole.cpu() <= tree.lengths, "contiguity", "stands for more tokens than there are")
    claim((start % torch.where(lod > 0, k, 1) == 0) | ~mask, "block alignment", "has a gist off the grid of blocks")
    claim((context.widths() == width) | ~mask, "level fits width", "has an entry whose width is not K^lod")
    sits = torch.tensor([tree.encoder.offset_in(k**n) if n else 0 for n in levels], device=device)
    positions = context.positions()
    claim(
        (positions == tree.rank(start) + sits[lod]) | ~mask,
        "positions",
        "has an entry that does not sit where it should",
    )
    claim((positions[:, 1:] > positions[:, :-1]) | ~mask[:, 1:], "monotonic", "has positions that do not ascend")

    if isinstance(tree, Composite):
        limits = zip(tree.parts, tree.caps, strict=True)
        over = [
            part.name for (part, cap), own in zip(limits, tree.segments(context), strict=False) if len(own[0]) > cap
        ]
        claim(torch.tensor([not over]), "share", f"has more entries of {', '.join(over)} than its share")
        if not wrong:
            wrong += [what for own in _alone(context) for what in violations(own)]
        return wrong

    # Of each node within the window there is the node itself, or all of its K children, or what stands for those.
    for level in range(1, tree.depth + 1):
        node = start // k**level
        # Of the nodes that have an entry below them, and no others: a history has many more.
        # One number for each: rows of two are told apart forty times slower.
        most = int(node[mask].max()) if mask.any() else 0
        place, own = (row[mask] * (most + 1) + node[mask]).unique(return_inverse=True)
        finer = torch.where(lod < level, width, 0)[mask]
        held = torch.zeros(len(place), dtype=torch.long, device=device).index_add_(0, own, finer)
        inside = (node + 1) * k**level <= whole[:, None]
        held = torch.zeros_like(node).masked_scatter(mask, held[own])
        claim(~inside | (held == 0) | (held == k**level), "swaps", f"has a share of the children of level {level}")
    return wrong


def _alone(context):
    """The window of each tree of a composite, as if it were alone."""
    for name, own in context.tree.alone(context):
        own.tree = own.tree if name is None else _Part(own.tree)
        yield own


class _Part:
    """A tree whose block 0 is a block like any other."""

    def __init__(self, tree):
        self._tree = tree

    def __getattr__(self, name):
        return getattr(self._tree, name)

    def usable(self, row: Tensor, lod: Tensor, index: Tensor) -> Tensor:
        return self._tree.usable(row, lod, index, sink=False)
