"""What detail costs in a working context at the moment, and which entries are worth more or less than that (method 10).

Values of all rows are in one currency, nats per token. Each row has a fixed number of entries to spend. The price p is
where demand meets supply. Gists that are worth more than p want to be expanded. Siblings that are worth less than p may
be collapsed, which pays for the expands.

    (K - 1) x #{v_down > p}  -  (K - 1) x #{sets of siblings with v_keep < p}   <=   slack = W_max - cost

The left side never rises with p, so the smallest p that holds is computed, not learned.

B rows, W entries, K children of a node.
"""

import torch
from torch import Tensor

from .edits import Moves


@torch.no_grad()
def price(
    v_down: Tensor, v_keep: Tensor, legal: Moves, slack: Tensor, block_size: int, margin: float | Tensor = 0.0
) -> Tensor:
    """The smallest p >= 0 at which the wanted edits fit the budget, or need least where they fit at no p.

    Without a margin, p lies just above the dearest siblings that must go, and these are worth hardly less than p. But
    the allocator makes an edit only beyond some distance from the price. So it would keep those siblings, however much
    waits for their place. ``margin`` is that distance. The edits that balance are then v_down > p + margin and
    v_keep < p - margin, and these are the edits that are made.

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
    # Both counts change at these values only, so the smallest p is one of them. "< p" is strict, so siblings count from
    # the next number above their value on.
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

    expand = tanh((v_down - price) / tau) where positive. collapse = tanh((v_keep - price) / tau) where negative; all
    entries of a set of siblings have that of the set. The larger magnitude counts, and expand if both are equal.

    Args:
        v_down: [B, W]; read where ``legal.expand``.
        v_keep: [B, W]; read at the first entry of each set.
        legal: of ``moves``.
        price: [B].
        tau: nats; a difference from the price of about tau is large.

    Returns:
        [B, W]; 0 where nothing is legal.

    Raises:
        ValueError: tau is not positive.
    """
    if not tau > 0:
        raise ValueError(f"tau={float(tau)} is not allowed: more than 0 nats")
    keep = v_keep.gather(1, legal.first.clamp(min=0))
    # A value of an illegal edit may be anything. It is replaced before the tanh, so that its gradient is 0 and not NaN.
    gain = torch.where(legal.expand, v_down - price[:, None], 0.0)
    loss = torch.where(legal.first >= 0, keep - price[:, None], 0.0)
    expand, collapse = torch.tanh(gain.clamp(min=0) / tau), torch.tanh(loss.clamp(max=0) / tau)
    return torch.where(-collapse > expand, collapse, expand)
