"""Gists of neighbours are pushed apart where they are alike (method 4)."""

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor

from megactx.data.documents import length_of
from megactx.framework.config.types import NonNegative, declared
from megactx.gist.loss import Context, Loss


@declared("contrastive")
class Contrastive(Loss):
    """Gists of neighbours are pushed apart: mean of ``max(0, margin - (1 - cosine))`` over the first net's pairs.

    Args:
        weight: lambda.
        margin: neighbours closer than this cosine distance are pushed apart.

    Raises:
        ValueError: a weight below 0; with the data, no document has room for a block with a right neighbour.
    """

    needs = ("block_starts",)
    main_vectors = True
    setting = "contrastive"

    def __init__(self, weight: NonNegative = 0.0, margin: Annotated[float, Ge(0), Le(2)] = 0.2):
        super().__init__(weight)
        self.margin = margin
        self.without_pairs = 0  # batches in which no block had a right neighbour, since the run began

    def __call__(self, context: Context) -> tuple[Tensor, dict[str, Tensor | float]]:
        starts, lengths, block = context.batch["block_starts"], context.batch["lengths"], context.block
        gists = context.carrier(context.main, starts).vectors
        right = starts + block
        paired = right + block <= lengths[:, None]
        if paired.any():
            # A block without a right neighbour gathers within the document, and is then left out.
            neighbours = context.carrier(context.main, torch.where(paired, right, starts)).vectors
            term = pushed_apart(gists[paired], neighbours[paired], self.margin)
        else:  # a batch of documents that are too short for it is no reason to stop
            self.without_pairs += 1
            term = gists.new_zeros(())
        return term[None], {
            "contrastive": term.detach(),
            "contrastive_without_pairs": float(self.without_pairs),  # of the first process
        }

    def check_data(self, datamodule, nets) -> None:
        needed, pools = 3 * next(iter(nets.values())).block_size, datamodule.training.pools.values()
        if self.weight and not any(length_of(document) >= needed for pool in pools for document in pool):
            raise ValueError(
                f"contrastive.weight={self.weight} is not allowed here: no training document has {needed} tokens, the"
                " sink block, a block and its right neighbour; set it to 0, or data.min_tokens higher, or give longer"
                " texts"
            )

    def state(self) -> dict:
        return {"without_pairs": self.without_pairs}

    def load_state(self, state: dict) -> None:
        self.without_pairs = state["without_pairs"]


def pushed_apart(gists: Tensor, neighbours: Tensor, margin: float) -> Tensor:
    """Mean over pairs; gists, neighbours [P, D], row i of the second is right of row i of the first.

    Raises:
        ValueError: no pairs.
    """
    if len(gists) == 0:
        raise ValueError("contrastive.weight is above 0, but no block has a right neighbour: use longer documents")
    distance = 1 - F.cosine_similarity(gists.float(), neighbours.float(), dim=-1)
    return F.relu(margin - distance).mean()
