"""Which of the values of an attribute a base LM says behind a window: what a cognitive core is measured by (method 22).

V values, A tokens of the longest, T tokens of the window.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.lm import BaseLM
from megactx.lm.masks import CAUSAL


@torch.no_grad()
def value_nll(base: BaseLM, window: Sequence[int], values: Sequence[Sequence[int]]) -> Tensor:
    """Ids of a window, and those of each value -> NLL of each value behind it, nats for all of its tokens [V].

    The window is read once; the values are read behind its keys and values.

    Raises:
        ValueError: the base LM takes no window that long.
    """
    from transformers import DynamicCache

    device, longest = base.model.device, max(map(len, values))
    if (total := len(window) + longest) > base.max_positions:
        raise ValueError(f"a window of {total} tokens is not allowed: the base LM takes {base.max_positions} positions")
    ids = torch.as_tensor(window, device=device)[None]
    cache = DynamicCache(config=base.config)
    hidden = base(base.embed(ids), torch.arange(len(window), device=device)[None], CAUSAL, cache)
    rows = torch.zeros(len(values), longest, dtype=torch.long)
    for row, value in zip(rows, values, strict=True):
        row[: len(value)] = torch.as_tensor(value)
    rows = rows.to(device)  # [V, A]
    states = hidden[:, -1:].expand(len(values), -1, -1)  # [V, 1, D]
    if longest > 1:  # the last token of a value predicts nothing
        cache.batch_repeat_interleave(len(values))
        behind = len(window) + torch.arange(longest - 1, device=device)
        mask = torch.ones(longest - 1, len(window) + longest - 1, dtype=torch.bool, device=device).tril(len(window))
        more = base(base.embed(rows[:, :-1]), behind.expand(len(values), -1), mask[None, None], cache)
        states = torch.cat([states, more], dim=1)  # [V, A, D]
    nll = F.cross_entropy(base.logits(states).float().flatten(0, 1), rows.flatten(), reduction="none").view_as(rows)
    there = torch.arange(longest) < torch.tensor([len(value) for value in values])[:, None]
    return (nll * there.to(device)).sum(dim=1).cpu()


def ckri(full: Sequence[float], drop: Sequence[float]) -> float:
    """How much the core relies on its knowledge: (L_drop - L_full) / L_full, of mean NLLs of right answers."""
    return sum(drop) / sum(full) - 1
