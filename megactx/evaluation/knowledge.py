"""Which of the values of an attribute a base LM says behind a window: what a cognitive core is measured by (method 22).

V values, A tokens of the longest, T tokens of the window.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.lm import BaseLM
from megactx.lm.masks import CAUSAL


def value_nll(base: BaseLM, window: Sequence[int], values: Sequence[Sequence[int]]) -> Tensor:
    """Ids of a window, and those of each value -> NLL of each value behind it, nats for all of its tokens [V].

    Raises:
        ValueError: the base LM takes no window that long.
    """
    ids = torch.as_tensor(window, device=base.model.device)[None]
    return read_values(base, base.embed(ids), torch.arange(len(window), device=ids.device)[None], values)[0]


@torch.no_grad()
def read_values(
    base: BaseLM, rows: Tensor, positions: Tensor, values: Sequence[Sequence[int]], sigma: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What the base LM says behind a window of tokens and gists.

    The window is read once; the values are read behind its keys and values.

    Args:
        rows: embeddings of the window, [1, T, D].
        positions: ascending, [1, T].
        values: ids of each value.
        sigma: [1, T], as ``BaseLM.forward`` takes it.

    Returns:
        NLL of each value, nats for all of its tokens [V]; and whether greedy decoding says it: each of its tokens is
        the argmax behind those before it [V].

    Raises:
        ValueError: the base LM takes no window that long.
    """
    from transformers import DynamicCache

    device, longest, length = base.model.device, max(map(len, values)), rows.shape[1]
    if (total := int(positions[0, -1]) + 1 + longest) > base.max_positions:
        raise ValueError(f"a window of {total} tokens is not allowed: the base LM takes {base.max_positions} positions")
    cache = DynamicCache(config=base.config)
    hidden = base(rows, positions, CAUSAL, cache, sigma)
    ids = torch.zeros(len(values), longest, dtype=torch.long)
    for row, value in zip(ids, values, strict=True):
        row[: len(value)] = torch.as_tensor(value)
    ids = ids.to(device)  # [V, A]
    states = hidden[:, -1:].expand(len(values), -1, -1)  # [V, 1, D]
    if longest > 1:  # the last token of a value predicts nothing
        cache.batch_repeat_interleave(len(values))
        behind = positions[:, -1:] + 1 + torch.arange(longest - 1, device=device)
        mask = torch.ones(longest - 1, length + longest - 1, dtype=torch.bool, device=device).tril(length)
        more = base(base.embed(ids[:, :-1]), behind.expand(len(values), -1), mask[None, None], cache)
        states = torch.cat([states, more], dim=1)  # [V, A, D]
    logits = base.logits(states).float()  # [V, A, vocabulary]
    nll = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
    there = (torch.arange(longest) < torch.tensor([len(value) for value in values])[:, None]).to(device)
    greedy = ((logits.argmax(dim=-1) == ids) | ~there).all(dim=1)
    return (nll * there).sum(dim=1).cpu(), greedy.cpu()


def ckri(full: Sequence[float], drop: Sequence[float]) -> float:
    """How much the core relies on its knowledge: (L_drop - L_full) / L_full, of mean NLLs of right answers."""
    return sum(drop) / sum(full) - 1
