"""What LensNet learns from windows whose edits were measured."""

from torch import Tensor

from megactx.focus.lensnet import LensNet
from megactx.focus.objectives import illegal_mass, net_mass, value_loss
from megactx.focus.states import States


def value_losses(lens: LensNet, states: States, learn: bool = False, pair_weight: float = 0.0) -> dict[str, Tensor]:
    """``loss`` of ``value_loss`` and its parts, and what is only watched; with ``learn`` the values enter ``tau``."""
    if learn:
        lens.see(states.values)
    values = lens(states.embeddings, states.lods, states.distance, states.there, states.content)
    estimates = states.estimates(values, lens.block_size)
    losses = value_loss(estimates, states.values, states.row, lens.tau, pair_weight)
    losses["net_mass"] = net_mass(values, states.legal, lens.tau).mean()
    losses["illegal"] = illegal_mass(values, states.legal, lens.tau)
    return losses
