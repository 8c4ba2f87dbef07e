"""What LensNet learns from windows whose edits were measured."""

from torch import Tensor

from megactx.focus.label_files import LensBatch
from megactx.focus.lensnet import LensNet
from megactx.focus.objectives import illegal_mass, net_mass, value_loss


def value_losses(lens: LensNet, batch: LensBatch, learn: bool = False) -> dict[str, Tensor]:
    """``loss``, as ``huber`` too, and what is only watched; with ``learn`` the values enter ``tau``."""
    if learn:
        lens.see(batch.labels)
    values = lens(batch.embeddings, batch.lods, batch.distance, batch.mask, batch.mean_embeddings)
    estimates = batch.estimates(values, lens.block_size)
    huber = value_loss(estimates, batch.labels)
    watched = {"net_mass": net_mass(values, batch.legal, lens.tau).mean()}
    watched["illegal"] = illegal_mass(values, batch.legal, lens.tau)
    return {"huber": huber, "loss": huber} | watched
