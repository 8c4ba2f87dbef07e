"""What LensNet learns from windows whose edits were measured."""

from torch import Tensor

from megactx.focus.lensnet import LensNet
from megactx.focus.objectives import illegal_mass, net_mass, value_loss
from megactx.focus.states import States


def value_losses(lens: LensNet, states: States, learn: bool = False) -> dict[str, Tensor]:
    """``loss``, as ``huber`` too, and what is only watched; with ``learn`` the values enter ``tau``."""
    if learn:
        lens.see(states.values)
    values = lens(states.embeddings, states.lods, states.distance, states.there, states.content)
    estimates = states.estimates(values, lens.block_size)
    huber = value_loss(estimates, states.values)
    watched = {"net_mass": net_mass(values, states.legal, lens.tau).mean()}
    watched["illegal"] = illegal_mass(values, states.legal, lens.tau)
    return {"huber": huber, "loss": huber} | watched
