"""What the base LM makes of carriers in place of their blocks: the packed pass for every kind of carrier."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megactx.lm import BaseLM
from megactx.lm.prefill import Prefill, rows_at

from .carrier import KVSlots, SoftTokens
from .substitution import slotted, substituted


def read_carriers(
    base: BaseLM, prefill: Prefill, starts: Tensor, carriers: Sequence[SoftTokens | KVSlots], tokens: int, horizon: int
) -> Tensor:
    """Hidden states of branches in which each carrier stands for its block.

    Args:
        starts: block starts [B, N].
        carriers: C of them, each of all blocks.
        tokens: of a block, K, or K^n where carriers of LOD n stand for so many.
        horizon: H.

    Returns:
        [C, B, N, H, D]; row h predicts token ``start + tokens + h``. Slots have no output row. Their row 0 is what the
        base LM knows without the block, as in ``dropped``, and ``carrier.first`` says where scores begin.
    """
    out: list[Tensor | None] = [None] * len(carriers)
    together: dict[int, list[int]] = {}
    for index, carrier in enumerate(carriers):
        if isinstance(carrier, KVSlots):
            before = rows_at(prefill.hidden, starts - 1, 1)
            out[index] = torch.cat([before, slotted(base, prefill, starts, carrier.layers, tokens, horizon)], dim=2)
        else:
            together.setdefault(carrier.slots, []).append(index)
    for indices in together.values():  # of as many vectors per block
        same = [carriers[index] for index in indices]
        hidden = substituted(
            base,
            prefill,
            starts,
            torch.stack([carrier.vectors for carrier in same]),
            [carrier.offset for carrier in same],
            tokens,
            horizon,
            [carrier.sigma for carrier in same],
        )
        for index, rows in zip(indices, hidden, strict=True):
            out[index] = rows
    return torch.stack(out)
