"""LensNet's loss on measured values of edits, and figures that are watched during training (method 10)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .edits import Moves
from .lensnet import masked

# Nats. Values have heavy tails, and a choice needs their mean. At 0.05 the loss learned the median, 0, and no edit was
# ever made; at 0.2 LensNet won 0.10 nat over recency (RESULTS.md). The squared error was worse than a constant.
HUBER = 0.2


def value_loss(estimates: Tensor, values: Tensor) -> Tensor:
    """Huber loss of LensNet's estimates on the measured values of E edits, both [E] nats; a scalar."""
    return F.huber_loss(estimates, values, delta=HUBER)


def net_mass(values: Tensor, legal: Moves, tau: Tensor) -> Tensor:
    """(P - N) / (P + N), P the summed scores of expands and N of collapses, [B]: near 0 the budget is in balance."""
    v_down, v_keep = masked(values, legal)
    expand = torch.tanh(v_down / tau).clamp(min=0).sum(1)
    collapse = -torch.tanh(torch.where(legal.leads, v_keep, 0.0) / tau).clamp(max=0).sum(1)
    return (expand - collapse) / (1e-6 + expand + collapse)


def illegal_mass(values: Tensor, legal: Moves, tau: Tensor) -> Tensor:
    """Mean square, in units of tau, of values where nothing is legal; a scalar."""
    wrong = torch.stack([~legal.expand, legal.first < 0], dim=-1)
    return ((values / tau).square() * wrong).sum() / wrong.sum().clamp(min=1)
