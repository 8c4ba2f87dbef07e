"""What LensNet is trained on: measured values of edits, or which of two windows was better (method 10)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .edits import Moves
from .lensnet import masked

# Values have heavy tails, and a choice needs their mean: with a delta of 0.05 nat the Huber loss learns the median, 0.
HUBER, MARGIN, APART = 0.2, 0.1, 0.02  # nats; of scores; nats
BUDGET, LEGALITY = 0.1, 0.3


def value_loss(
    estimates: Tensor, values: Tensor, row: Tensor, tau: Tensor, pair_weight: float = 0.0
) -> dict[str, Tensor]:
    """Huber on values, and where asked a hinge on the order of values that clearly differ.

    Args:
        estimates: of LensNet for E edits, [E] nats.
        values: measured, [E] nats.
        row: which working context each edit is of, [E]; pairs are of one.
        tau: the unit of a score, nats.
        pair_weight: of the hinge. The Huber loss is a hundredth of it: at 0.5 the hinge sets the values.

    Returns:
        ``huber``, ``pairs`` and their weighted sum ``loss``, scalars.
    """
    huber = F.huber_loss(estimates, values, delta=HUBER)
    apart = values[:, None] - values
    counts = (row[:, None] == row) & (apart > APART)  # each pair once, the better one first
    hinge = (MARGIN - (estimates[:, None] - estimates) / tau).clamp(min=0)
    pairs = (hinge * counts).sum() / counts.sum().clamp(min=1)
    return {"huber": huber, "pairs": pairs, "loss": huber + pair_weight * pairs}


def preference_loss(better: Tensor, a: Tensor, b: Tensor, legal_a: Moves, legal_b: Moves, tau: Tensor) -> dict:
    """Bradley-Terry over pairs of windows of one text and equal cost.

    A window is as good as the detail that it shows is worth, less what its gists hide: the mean over its entries of
    v_keep and of -v_down.

    Args:
        better: NLL of b less NLL of a, [P] nats: positive where a is better.
        a, b: values of LensNet, [P, W, 2].
        legal_a, legal_b: their legal moves.
        tau: the unit of a score, nats.

    Returns:
        ``preference``, ``budget``, ``legality`` and their weighted sum ``loss``, scalars.
    """
    s = _worth(a, legal_a) - _worth(b, legal_b)
    preference = (F.softplus(-better.sign() * s / tau) * better.abs()).mean()
    budget = torch.cat([net_mass(a, legal_a, tau), net_mass(b, legal_b, tau)]).square().mean()
    legality = (illegal_mass(a, legal_a, tau) + illegal_mass(b, legal_b, tau)) / 2
    loss = preference + BUDGET * budget + LEGALITY * legality
    return {"preference": preference, "budget": budget, "legality": legality, "loss": loss}


def _worth(values: Tensor, legal: Moves) -> Tensor:
    v_down, v_keep = masked(values, legal)
    count = (legal.expand | (legal.first >= 0)).sum(1).clamp(min=1)
    return (v_keep - v_down).sum(1) / count


def net_mass(values: Tensor, legal: Moves, tau: Tensor) -> Tensor:
    """(P - N) / (P + N) of what would be expanded and what would be collapsed, [B]: near 0 the budget is in balance."""
    v_down, v_keep = masked(values, legal)
    expand = torch.tanh(v_down / tau).clamp(min=0).sum(1)
    collapse = -torch.tanh(torch.where(legal.leads, v_keep, 0.0) / tau).clamp(max=0).sum(1)
    return (expand - collapse) / (1e-6 + expand + collapse)


def illegal_mass(values: Tensor, legal: Moves, tau: Tensor) -> Tensor:
    """Mean square, in units of tau, of values where nothing is legal; a scalar."""
    wrong = torch.stack([~legal.expand, legal.first < 0], dim=-1)
    return ((values / tau).square() * wrong).sum() / wrong.sum().clamp(min=1)
