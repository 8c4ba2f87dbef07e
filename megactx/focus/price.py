"""What detail costs in a working context at the moment, and which entries are worth more or less than that (method 10).

All rows share one currency, nats per token, and each has a fixed number of entries to spend. The price is where demand
meets supply: gists worth more than it want to be expanded, siblings worth less than it may pay by being collapsed.

    (K - 1) x #{v_down > p}  -  (K - 1) x #{sets of siblings with v_keep < p}   <=   slack = W_max - cost

The left side only falls as p rises, so the smallest such p is computed, not learned.

B rows, W entries, K children of a node.
"""

import torch
from torch import Tensor

from .edits import Moves


@torch.no_grad()
def price(
    v_down: Tensor, v_keep: Tensor, legal: Moves, slack: Tensor, block_size: int, margin: float | Tensor = 0.0
) -> Tensor:
    """The smallest p >= 0 at which the edits that it calls for fit the budget; where none does, the smallest p at which
    they need the least.

    The smallest p lies just above the dearest siblings that must go, so these are worth next to nothing less than it:
    whoever makes an edit only beyond some distance from the price will not make that one, however much waits for it.
    With that distance as ``margin``, the edits that balance are those that are made: v_down > p + margin and
    v_keep < p - margin.

    Args:
        v_down: of each gist, [B, W]; read where ``legal.expand``.
        v_keep: of each set of siblings, [B, W]; read at its first entry.
        legal: of ``moves``.
        slack: entries that are free, [B]; negative where there are too many.
        block_size: K.
        margin: nats.

    Returns:
        [B], float32.
    """
    least = torch.finfo(torch.float32).max
    worth = torch.where(legal.expand, v_down.float() - margin, -least).sort(1).values
    spared = torch.where(legal.leads, v_keep.float() + margin, least).sort(1).values
    # Between two of these nothing changes. "< p" is strict: siblings are counted just above what they are worth.
    above = torch.nextafter(spared, torch.full_like(spared, torch.inf))
    floor = worth.new_zeros(len(worth), 1)
    p = torch.cat([floor, worth, torch.where(spared < least, above, 0)], dim=1).clamp(min=0).sort(1).values
    demand = worth.shape[1] - torch.searchsorted(worth, p, right=True)
    net = demand - torch.searchsorted(spared, p)  # [B, 2 W + 1], falling
    fits = torch.div(slack, block_size - 1, rounding_mode="floor")[:, None]
    found = (net <= torch.maximum(fits, net[:, -1:])).long().argmax(1, keepdim=True)
    return p.gather(1, found)[:, 0]


def signed_scores(v_down: Tensor, v_keep: Tensor, legal: Moves, price: Tensor, tau: float | Tensor) -> Tensor:
    """Values against the price, from -1 (collapse) to 1 (expand).

    expand = tanh((v_down - price) / tau) where positive; collapse = tanh((v_keep - price) / tau) where negative, for
    every entry of a set of siblings that of the set. The larger one in magnitude counts, expand where they are equal.

    Args:
        v_down: [B, W]; read where ``legal.expand``.
        v_keep: [B, W]; read at the first entry of each set.
        legal: of ``moves``.
        price: [B].
        tau: the unit in which a difference is large, in nats.

    Returns:
        [B, W]; 0 where nothing is legal.

    Raises:
        ValueError: tau is not positive.
    """
    if not tau > 0:
        raise ValueError(f"tau={float(tau)} is not allowed: more than 0 nats")
    keep = v_keep.gather(1, legal.first.clamp(min=0))
    # Where a value means nothing it may be anything: it is taken out before the tanh, for the sake of the gradient.
    gain = torch.where(legal.expand, v_down - price[:, None], 0.0)
    loss = torch.where(legal.first >= 0, keep - price[:, None], 0.0)
    expand, collapse = torch.tanh(gain.clamp(min=0) / tau), torch.tanh(loss.clamp(max=0) / tau)
    return torch.where(-collapse > expand, collapse, expand)
