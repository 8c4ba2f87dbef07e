"""Attention of rows that each have a cache of their own: one new token of several histories in one pass.

Histories have lengths of their own, so their keys and values are no batch. All other work of a layer is the same for
every row: its weights are read once for all of them, and reading weights is what a token alone costs.

N histories, A heads, G key-value heads, S columns of a history, W head width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

NAME = "megactx_each_cache"


class EachCache:
    """What the attention of every layer reads, and adds to, in one pass.

    Args:
        caches: of each history, transformers caches of one row; they get a column more.
    """

    def __init__(self, caches: Sequence):
        self.caches, self.layers = caches, 0


def attend_grouped(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """One row per history that sees all columns: query [B, A, 1, W], key and value [B, G, S, W] -> [B, 1, A, W].

    The heads that share keys become rows of one head, so that keys are read where they lie and not repeated.
    """
    b, heads, _, width = query.shape
    rows = query.view(b, key.shape[1], heads // key.shape[1], width)
    return F.scaled_dot_product_attention(rows, key, value, scale=scaling).reshape(b, 1, heads, value.shape[3])


def attend(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, each: EachCache, scaling=None, **kwargs):
    """The attention function: query [N, A, 1, W], key and value [N, G, 1, W] of the new tokens -> [N, 1, A, W]."""
    each.layers += 1
    found = []
    for n, cache in enumerate(each.caches):
        kept = cache.layers[module.layer_idx].update(key[n : n + 1], value[n : n + 1])
        found.append(attend_grouped(query[n : n + 1], *kept, scaling))
    return torch.cat(found), None


AttentionInterface.register(NAME, attend)
