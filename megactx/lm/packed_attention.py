"""Attention of many branches over one cached prefix: one pass through the layers, attention in groups.

Linear layers are fastest on all rows at once. Attention is fastest on few rows: a group's rows compute scores with as
many cached columns as the longest prefix among them. So all rows go through the model together, and only the attention
function works group by group. transformers lets us name that function (``AttentionInterface``).

    columns of a group     cache_start[k] <= t < cache_len[k] | one slot per branch, where given | rows of the group

On a CPU the scores of a group are a product of matrices (``products``). Each branch then has columns for its own rows
only, and the backward pass makes no gradient of cached columns that nobody asks for.

B documents, N branches of R rows, A heads, G key-value heads, F = A / G, W head width, C cached columns, O own columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from . import masks
from .products import Space, products_of

NAME = "megactx_branches"
# Rows of a group. Larger groups have more cached columns that some rows must not see (on a GPU also columns of the
# other rows). Smaller ones read the cache more often and launch more kernels.
ROWS_PER_GROUP = {"cpu": 256, "cuda": 4096}
BY_PRODUCTS = ("cpu",)  # devices


@dataclass(frozen=True)
class Group:
    """Some rows of a pass, and the most cached columns that any of them sees.

    ``mask``: what is added to the scores. On a CPU that of the cached columns from ``seen`` on, [B, N, C - seen], which
    all rows of a branch share: all see the columns before. Elsewhere of all columns, [B, 1, N * R, all columns].
    """

    rows: slice
    branches: slice
    columns: int
    mask: Tensor
    seen: int = 0


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
        device = cache_len.device
        self.by_products = device.type in BY_PRODUCTS
        size = max(1, ROWS_PER_GROUP.get(device.type, 256) // rows)  # branches of a group
        if self.by_products:
            own = masks.branches(cache_len.new_zeros(1, 1), rows, 0, slots=slots is not None)[0, 0]
            self.own = masks.additive(own, torch.float32)  # [R, O], O = R and the slot
            self.space = Space()
        # [N], over the documents, which share each group's columns. Columns are a slice, whose end the host must know:
        # this is the one time in a pass that it waits for the device.
        shortest, longest = torch.stack([cache_len.amin(dim=0), cache_len.amax(dim=0)]).tolist()
        self.groups = []
        for first in range(0, len(longest), size):
            part = cache_len[:, first : first + size]  # [B, branches of the group]
            columns, seen = max(longest[first : first + size]), 0
            begin = None if cache_start is None else cache_start[:, first : first + size]
            # Made once per group and read by all layers.
            if self.by_products:
                column = torch.arange(columns)
                if begin is None:
                    seen = min(shortest[first : first + size])
                    visible = column[seen:] < part[:, :, None]
                else:
                    visible = (column < part[:, :, None]) & (column >= begin[:, :, None])
                mask = masks.additive(visible, torch.float32)
            else:
                mask = masks.additive(masks.branches(part, rows, columns, begin, slots is not None), dtype)
            last = first + part.shape[1]
            self.groups.append(Group(slice(first * rows, last * rows), slice(first, last), columns, mask, seen))


def attend(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, branches: Branches, **kwargs):
    """The attention function: query [B, heads, N * R, D / heads], key and value of the same rows -> [B, N * R, ...]."""
    kv_cache = branches.kv_cache[module.layer_idx]
    slots = branches.slots[module.layer_idx] if branches.slots is not None else None
    out = []
    if branches.by_products:
        kv_cache = [part.float() for part in kv_cache]  # once, not in every group
    for group in branches.groups:
        rows = query[:, :, group.rows]  # [B, heads, rows of the group, head width]
        cached = [part[:, :, : group.columns] for part in kv_cache]
        own = [part[:, :, group.rows] for part in (key, value)]  # each [B, key-value heads, rows, head width]
        extra = [] if slots is None else [part[:, :, group.branches] for part in slots]
        if branches.by_products:
            assert not kwargs.get("dropout"), "the base LM is frozen and has no dropout"
            count = group.branches.stop - group.branches.start
            own = [part.unflatten(2, (count, -1)) for part in own]  # [B, key-value heads, N, R, head width]
            if extra:
                own = [torch.cat([slot[:, :, :, None], part], dim=3) for slot, part in zip(extra, own, strict=True)]
            scale = kwargs.get("scaling") or 1 / math.sqrt(query.shape[3])
            found = _Attend.apply(rows, *cached, *own, group, branches.own, scale, branches.space)
            out.append(found.transpose(1, 2))
            continue
        # The order of the columns is that of the mask: cached, slots, own rows. Keys were rotated when they were made,
        # so they may stand side by side in any order.
        parts = zip(cached, extra, own, strict=True) if extra else zip(cached, own, strict=True)
        seen = [torch.cat(columns, dim=2) for columns in parts]  # [B, key-value heads, all columns, head width]
        out.append(sdpa_attention_forward(module, rows, *seen, group.mask, **kwargs)[0])
    branches.layers += 1
    return torch.cat(out, dim=1), None


class _Attend(torch.autograd.Function):
    """Attention of a group: query [B, A, N * R, W], cached keys and values fp32 [B, G, C, W], own ones [B, G, N, O, W].

    Rows lie as [B * G, N * F * R, W] inside: heads that share keys are more rows of a branch.
    """

    @staticmethod
    def forward(ctx, query, cached_key, cached_value, own_key, own_value, group, own_mask, scale, space):
        ctx.group, ctx.own_mask, ctx.scale, ctx.space = group, own_mask, scale, space
        (b, a, _, w), (_, g, n, _, _) = query.shape, own_key.shape
        ctx.shape = b, g, a // g, n, query.shape[2] // n, w
        with products_of(query.dtype):
            shares = _Attend._shares(ctx, query, cached_key, own_key)
            cached, own = _Attend._split(ctx, shares, cached_key.shape[2])
            out = torch.bmm(cached, cached_value.flatten(0, 1))
            out = out.view(b * g * n, -1, w).baddbmm_(own, own_value.flatten(0, 2).float()).view(b * g, -1, w)
        ctx.save_for_backward(query, cached_key, cached_value, own_key, own_value, out)
        return _Attend._outside(ctx, out).to(query.dtype)

    @staticmethod
    def backward(ctx, slope):
        query, cached_key, cached_value, own_key, own_value, out = ctx.saved_tensors
        b, g, f, n, r, w = ctx.shape
        asked = ctx.needs_input_grad
        found = [None] * 5
        with products_of(query.dtype):
            shares = _Attend._shares(ctx, query, cached_key, own_key)
            slope = _Attend._inside(ctx, slope)
            change = ctx.space.take("scores", *shares.shape)
            columns = cached_key.shape[2]
            (cached, own), (to_cached, to_own) = (_Attend._split(ctx, part, columns) for part in (shares, change))
            by_branch = slope.view(b * g * n, f * r, w)
            torch.bmm(slope, cached_value.flatten(0, 1).mT, out=to_cached)
            to_own.copy_(torch.bmm(by_branch, own_value.flatten(0, 2).float().mT))
            if asked[2]:
                found[2] = torch.bmm(cached.mT, slope).view_as(cached_value)
            if asked[4]:
                found[4] = torch.bmm(own.mT, by_branch).view_as(own_value).to(own_value.dtype)
            # d softmax: what each row's output would gain on the whole is taken off.
            change.sub_((slope * out).sum(dim=-1, keepdim=True)).mul_(shares)
            if asked[0]:
                rows = torch.bmm(to_cached, cached_key.flatten(0, 1)).view(b * g * n, f * r, w)
                rows.baddbmm_(to_own, own_key.flatten(0, 2).float())
                found[0] = _Attend._outside(ctx, rows.mul_(ctx.scale)).to(query.dtype)
            inside = _Attend._inside(ctx, query)
            if asked[1]:
                found[1] = torch.bmm(to_cached.mT, inside).mul_(ctx.scale).view_as(cached_key)
            if asked[3]:
                keys = torch.bmm(to_own.mT, inside.view(b * g * n, f * r, w)).mul_(ctx.scale)
                found[3] = keys.view_as(own_key).to(own_key.dtype)
        return *found, None, None, None, None

    @staticmethod
    def _inside(ctx, rows: Tensor) -> Tensor:
        """[B, A, N * R, W] -> fp32 [B * G, N * F * R, W]."""
        b, g, f, n, r, w = ctx.shape
        return rows.reshape(b, g, f, n, r, w).transpose(2, 3).float().reshape(b * g, n * f * r, w).contiguous()

    @staticmethod
    def _outside(ctx, rows: Tensor) -> Tensor:
        b, g, f, n, r, w = ctx.shape
        return rows.view(b, g, n, f, r, w).transpose(2, 3).reshape(b, g * f, n * r, w)

    @staticmethod
    def _split(ctx, whole: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Scores [B * G, N * F * R, C + O] -> those of cached columns, and of own ones [B * G * N, F * R, O]."""
        b, g, f, n, r, _ = ctx.shape
        return whole[:, :, :columns], whole.view(b * g * n, f * r, -1)[:, :, columns:]

    @staticmethod
    def _shares(ctx, query: Tensor, cached_key: Tensor, own_key: Tensor) -> Tensor:
        """What each row takes of each column, fp32 [B * G, N * F * R, C + O], in memory that the next call takes."""
        (b, g, f, n, r, w), columns = ctx.shape, cached_key.shape[2]
        rows = _Attend._inside(ctx, query) * ctx.scale
        scores = ctx.space.take("scores", b * g, n * f * r, columns + own_key.shape[3])
        cached, own = _Attend._split(ctx, scores, columns)
        torch.bmm(rows, cached_key.flatten(0, 1).mT, out=cached)
        own.copy_(torch.bmm(rows.view(b * g * n, f * r, w), own_key.flatten(0, 2).float().mT))
        by_branch = scores.view(b, g, n, f, r, -1)
        seen = ctx.group.seen
        by_branch[..., seen:columns] += ctx.group.mask[:, None, :, None, None]
        by_branch[..., columns:] += ctx.own_mask
        return torch.softmax(scores, dim=-1, out=ctx.space.take("shares", *scores.shape))


AttentionInterface.register(NAME, attend)
