"""Attention of many branches over one cached prefix: one pass through the layers, attention in groups.

Linear layers are fastest on all rows at once; attention is fastest on few, because rows of one group pass over each
other's columns, and over the longest prefix among them. So the rows go through the model together, and only its
attention function, which transformers lets us name (``AttentionInterface``), works group by group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from . import masks

NAME = "megactx_branches"
# Rows of a group. Larger ones waste columns, smaller ones waste kernel launches.
ROWS_PER_GROUP = {"cpu": 256, "cuda": 4096}


@dataclass(frozen=True)
class Group:
    """Some rows of a pass, how many cached columns they see at most, and their mask [B, 1, Q, columns + Q]."""

    rows: slice
    columns: int
    mask: Tensor


class Branches:
    """What the attention of every layer reads in one packed pass.

    Args:
        kept: keys and values of a pass over the whole documents, per layer, each [B, key-value heads, T, head width].
        prefix: visible cached columns of each branch [B, N], best in ascending order.
        rows: rows R of each branch.
        dtype: of the pass.
    """

    def __init__(self, kept: Sequence[tuple[Tensor, Tensor]], prefix: Tensor, rows: int, dtype: torch.dtype):
        self.kept, self.layers = kept, 0
        size = max(1, ROWS_PER_GROUP.get(prefix.device.type, 256) // rows)
        longest = prefix.amax(dim=0).tolist()  # the one host sync of a pass
        self.groups = []
        for first in range(0, len(longest), size):
            part = prefix[:, first : first + size]
            columns = max(longest[first : first + size])
            mask = masks.additive(masks.branches(part, rows, columns), dtype)
            self.groups.append(Group(slice(first * rows, (first + part.shape[1]) * rows), columns, mask))


def attend(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, branches: Branches, **kwargs):
    """The attention function: query [B, heads, N * R, D / heads], key and value of the same rows -> [B, N * R, ...]."""
    keys, values = branches.kept[module.layer_idx]
    out = []
    for group in branches.groups:
        seen_keys = torch.cat([keys[:, :, : group.columns], key[:, :, group.rows]], dim=2)
        seen_values = torch.cat([values[:, :, : group.columns], value[:, :, group.rows]], dim=2)
        rows = query[:, :, group.rows]
        out.append(sdpa_attention_forward(module, rows, seen_keys, seen_values, group.mask, **kwargs)[0])
    branches.layers += 1
    return torch.cat(out, dim=1), None


AttentionInterface.register(NAME, attend)
