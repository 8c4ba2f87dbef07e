"""What the entries of a window are about, remembered from one refocus to the next.

A gist of 32,768 tokens has that many embeddings to average, and the window of a long history holds dozens of such. All
but a few stand there since the last refocus: only new ones are worked out, so that a refocus costs the same at any
length of the history.
"""

import torch
from torch import Tensor

from megactx.focus.mean_embeddings import node_mean_embeddings
from megactx.memory import WorkingContext


class MeanEmbeddingCache:
    """``window_mean_embeddings`` with a memory of the last window."""

    def __init__(self):
        self.nodes: Tensor | None = None  # [M], ascending names
        self.values: Tensor | None = None  # [M, D]

    def forget(self) -> None:
        """Another text stands where one stood."""
        self.nodes = self.values = None

    @torch.no_grad()
    def __call__(self, context: WorkingContext) -> Tensor:
        """The mean embedding of the tokens of each entry, [B, W, D] in fp32; 0 in the padding."""
        row, column = context.mask.nonzero().unbind(1)
        lod, index = context.lod[row, column], context.index[row, column]
        name = (row << 46) + (lod << 40) + index
        known = torch.zeros_like(name, dtype=torch.bool)
        out = torch.zeros(len(name), context.tree.width, device=name.device)
        if self.nodes is not None and len(self.nodes):
            place = torch.searchsorted(self.nodes, name).clamp(max=len(self.nodes) - 1)
            known = self.nodes[place] == name
            out[known] = self.values[place[known]]
        if not known.all():
            out[~known] = node_mean_embeddings(context.tree, row[~known], lod[~known], index[~known])
        gists = lod > 0  # tokens are one look-up each, and there are many
        self.nodes, order = name[gists].sort()
        self.values = out[gists][order]
        table = out.new_zeros(*context.lod.shape, context.tree.width)
        table[row, column] = out
        return table
