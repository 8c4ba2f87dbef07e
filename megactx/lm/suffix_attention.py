"""Attention of rows behind cached columns, without a mask, and only where somebody reads what comes out.

    columns of a row     cached: all rows of its run see them | rows of its run up to itself

A dense mask makes SDPA compute scores that it then throws away. Here the cached columns are one call and the run's own
rows another, a causal one. SDPA's kernel for the CPU also gives the logarithm of each row's sum, and with these two
parts make exactly what one softmax over both would.

Behind the last layer only some rows are read: the last ones of each run. So that layer attends for them alone, and its
MLP works on them alone. Keys and values of all rows are still made.

B rows of a batch, Q rows of a pass, R rows of a run, S cached columns, A heads, W head width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

from . import masks
from .each_cache import attend_grouped

NAME = "megactx_suffix"
_cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the one that gives the sums too


@dataclass(frozen=True)
class Run:
    """Rows ``start`` to ``stop`` of a pass, one behind the other, behind the first ``cached`` columns of a document."""

    start: int
    stop: int
    cached: int
    document: int = 0  # row of the cache

    def read(self, last: int) -> slice:
        """The rows whose final states are read: the last ones."""
        return slice(max(self.start, self.stop - last), self.stop)


class Suffix:
    """What the attention of every layer reads in one pass.

    Args:
        runs: of the rows of the pass, which then is one row of a batch; ``None``: all Q rows of every row of the batch
            are one run behind what the pass finds in its cache.
        kv_cache: with runs: keys and values of a pass over the documents, per layer, each [B, key-value heads, T, W].
        last: rows at the end of each run whose final states are read; ``None``: all.
    """

    def __init__(self, runs: Sequence[Run] | None = None, kv_cache=None, last: int | None = None):
        self.runs, self.kv_cache, self.last, self.layers = runs, kv_cache, last, 0
        self.final: int | None = None  # the last layer

    def rows(self, count: int) -> list[slice]:
        """The rows of a pass of ``count`` that are read."""
        runs = [Run(0, count, 0)] if self.runs is None else self.runs
        return [run.read(count if self.last is None else self.last) for run in runs]


def attend(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, suffix: Suffix, scaling=None, **kwargs):
    """The attention function: query [B, A, Q, W], key and value of the same rows, or with all cached ones before them,
    -> [B, Q, A, W]; 0 where nobody reads it."""
    suffix.layers += 1
    groups = getattr(module, "num_key_value_groups", 1)
    b, heads, q, _ = query.shape
    if suffix.runs is None and q == 1:
        return attend_grouped(query, key, value, scaling), None
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    final = module.layer_idx == suffix.final
    if suffix.runs is None:
        cached = key.shape[2] - q
        runs, old = [Run(0, q, cached)], (key[:, :, :cached], value[:, :, :cached])
        key, value = key[:, :, cached:], value[:, :, cached:]
    else:
        runs = suffix.runs
    out = query.new_zeros(b, q, heads, value.shape[3])
    for run in runs:
        if suffix.runs is not None:
            kept = (
                part[run.document : run.document + 1, :, : run.cached] for part in suffix.kv_cache[module.layer_idx]
            )
            old = tuple(repeat_kv(part, groups) for part in kept)
        read = run.read(suffix.last) if final and suffix.last is not None else slice(run.start, run.stop)
        # Of the rows before those that are read, all are seen by all.
        before, own = slice(run.start, read.start), slice(read.start, run.stop)
        parts = [old, (key[:, :, before], value[:, :, before])]
        parts = [part for part in parts if part[0].shape[2]]
        out[:, read] = _merged(query[:, :, read], parts, (key[:, :, own], value[:, :, own]), scaling).transpose(1, 2)
    return out, None


def _merged(query: Tensor, seen: list[tuple[Tensor, Tensor]], own: tuple[Tensor, Tensor], scale) -> Tensor:
    """Attention over columns that all rows see, and over the rows' own, causally: [B, A, R, W]."""
    if query.device.type != "cpu" or query.shape[3] != own[1].shape[3]:
        key, value = (torch.cat([*(part[n] for part in seen), own[n]], dim=2) for n in (0, 1))
        mask = F.pad(masks.causal(query.shape[2], query.device), (key.shape[2] - query.shape[2], 0), value=True)
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    out, total = _cpu_attention(query, *own, 0.0, True, scale=scale)
    for part in seen:
        other, its = _cpu_attention(query, *part, 0.0, False, scale=scale)
        out = torch.lerp(other, out, torch.sigmoid(total - its)[..., None].to(out.dtype))
        total = torch.logaddexp(total, its)
    return out


@contextmanager
def narrowed(layer: nn.Module, rows: list[slice]) -> Iterator[None]:
    """Inside, the MLP of a layer works on some of its rows [B, Q, D]; the others get 0. Without an ``mlp`` on all."""
    mlp = getattr(layer, "mlp", None)
    if not isinstance(mlp, nn.Module):
        yield
        return
    whole = []

    def narrow(module, given):
        whole.append(given[0])
        return torch.cat([given[0][:, part] for part in rows], dim=1), *given[1:]

    def widen(module, given, found):
        wide, start = torch.zeros_like(whole.pop()), 0
        values, *others = found if isinstance(found, tuple) else (found,)
        for part in rows:
            count = part.stop - part.start
            wide[:, part] = values[:, start : start + count]
            start += count
        return (wide, *others) if isinstance(found, tuple) else wide

    hooks = [mlp.register_forward_pre_hook(narrow), mlp.register_forward_hook(widen)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


AttentionInterface.register(NAME, attend)
