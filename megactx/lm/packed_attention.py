"""Attention of many branches over one cached prefix: one pass through the layers, attention in groups.

Linear layers are fastest on all rows at once. Attention is fastest on few rows: each row of a group also computes
scores with the columns of the other rows, and with as many cached columns as the longest prefix among them. So all rows
go through the model together, and only the attention function works group by group. transformers lets us name that
function (``AttentionInterface``).

    columns of a group     cache_start[k] <= t < cache_len[k] | one slot per branch, where given | rows of the group
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from . import masks

NAME = "megactx_branches"
# Rows of a group. In a group of Q rows each row computes scores with all Q of them and is masked from all but its own
# branch, so larger groups waste columns. Smaller ones read the cache more often and launch more kernels.
ROWS_PER_GROUP = {"cpu": 256, "cuda": 4096}


@dataclass(frozen=True)
class Group:
    """Some rows of a pass, the most cached columns that any of them sees, and their mask [B, 1, Q, all columns]."""

    rows: slice
    branches: slice
    columns: int
    mask: Tensor


class Branches:
    """What the attention of every layer reads in one packed pass.

    Args:
        kv_cache: keys and values of a pass over whole documents, per layer, each [B, key-value heads, T, head width].
        cache_len: visible cached columns of each branch [B, N], best in ascending order.
        rows: rows R of each branch.
        dtype: of the pass.
        cache_start: first visible cached column of each branch [B, N]; ``None``: 0.
        slots: keys and values of one more column per branch and layer, each [B, key-value heads, N, head width]. All
            rows of the branch see it, and no other rows do.
    """

    def __init__(
        self,
        kv_cache: Sequence[tuple[Tensor, Tensor]],
        cache_len: Tensor,
        rows: int,
        dtype: torch.dtype,
        cache_start: Tensor | None = None,
        slots: Sequence[tuple[Tensor, Tensor]] | None = None,
    ):
        self.kv_cache, self.slots, self.layers = kv_cache, slots, 0
        size = max(1, ROWS_PER_GROUP.get(cache_len.device.type, 256) // rows)  # branches of a group
        # [N], over the documents, which share each group's columns. Columns are a slice, whose end the host must know:
        # this is the one time in a pass that it waits for the device.
        longest = cache_len.amax(dim=0).tolist()
        self.groups = []
        for first in range(0, len(longest), size):
            part = cache_len[:, first : first + size]  # [B, branches of the group]
            columns = max(longest[first : first + size])
            begin = None if cache_start is None else cache_start[:, first : first + size]
            # Made once per group and read by all layers.
            mask = masks.additive(masks.branches(part, rows, columns, begin, slots is not None), dtype)
            last = first + part.shape[1]
            self.groups.append(Group(slice(first * rows, last * rows), slice(first, last), columns, mask))


def attend(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, branches: Branches, **kwargs):
    """The attention function: query [B, heads, N * R, D / heads], key and value of the same rows -> [B, N * R, ...]."""
    kv_cache = branches.kv_cache[module.layer_idx]
    slots = branches.slots[module.layer_idx] if branches.slots is not None else None
    out = []
    for group in branches.groups:
        seen = []
        for part, own in enumerate((key, value)):  # each [B, key-value heads, N * R, head width]
            # The order of the columns is that of the mask: cached, slots, own rows. Keys were rotated when they were
            # made, so they may stand side by side in any order.
            columns = [kv_cache[part][:, :, : group.columns], own[:, :, group.rows]]
            if slots is not None:
                columns.insert(1, slots[part][:, :, group.branches])
            seen.append(torch.cat(columns, dim=2))  # [B, key-value heads, columns of the group, head width]
        rows = query[:, :, group.rows]  # [B, heads, rows of the group, head width]
        out.append(sdpa_attention_forward(module, rows, *seen, group.mask, **kwargs)[0])
    branches.layers += 1
    return torch.cat(out, dim=1), None


AttentionInterface.register(NAME, attend)
