"""Attention on a CPU as products of matrices with a softmax between them.

SDPA's kernel for CPUs works at a sixth of the speed of a product in bf16, forward and backward (measured with AVX-512
bf16 units, 256 rows, 850 columns, heads of 64 numbers: 6.6 and 16 ms; products: 2.5 and 5). The price is memory for
the scores of some rows.

B documents, A heads, G key-value heads, F = A / G, T tokens, W head width.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megactx.framework.run.device import cpu_bf16_units

from . import masks

ROWS = 256  # whose scores are in memory at a time


class Space:
    """Memory for scores that is used again and again: new pages would cost as much as the scores themselves."""

    def __init__(self):
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """fp32, with anything in it."""
        count = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < count:
            self.buffers[name] = torch.empty(count)
        return self.buffers[name][:count].view(shape)


@contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """Inside, products of fp32 matrices give fp32; where ``dtype`` is bf16 and the CPU can, of factors in bf16."""
    settings = torch.backends.mkldnn.matmul
    usual = settings.fp32_precision
    if dtype == torch.bfloat16 and cpu_bf16_units():
        settings.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        settings.fp32_precision = usual


@torch.no_grad()
def causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Each row sees itself and those before it: query [B, A, T, W], key and value [B, G, T, W] -> [B, A, T, W]."""
    (b, a, t, w), g = query.shape, key.shape[1]
    f, space = a // g, Space()
    rows = (query * scale).float().view(b, g, f, t, w)
    key, value = key.float().flatten(0, 1), value.float().flatten(0, 1)  # [B * G, T, W]
    out = torch.empty_like(rows)
    with products_of(query.dtype):
        for start in range(0, t, ROWS):
            stop = min(t, start + ROWS)
            count = stop - start
            scores = space.take("scores", b * g, f * count, stop)
            torch.bmm(rows[:, :, :, start:stop].reshape(b * g, f * count, w), key[:, :stop].mT, out=scores)
            hidden = masks.additive(masks.causal(count), torch.float32)[0, 0]
            scores.view(b * g * f, count, stop)[:, :, start:] += hidden
            shares = torch.softmax(scores, dim=-1, out=space.take("shares", *scores.shape))
            out[:, :, :, start:stop] = torch.bmm(shares, value[:, :stop]).view(b, g, f, count, w)
    return out.view(b, a, t, w).to(query.dtype)
