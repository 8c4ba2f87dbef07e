"""Loss terms of GistNet that need no base LM (method 4)."""

import torch.nn.functional as F
from torch import Tensor


def contrastive(gists: Tensor, neighbours: Tensor, margin: float) -> Tensor:
    """Neighbours closer than the margin are pushed apart: mean of ``max(0, margin - (1 - cosine))``.

    Args:
        gists, neighbours: [P, D]; row i of ``neighbours`` is the gist of the block to the right of row i's.

    Raises:
        ValueError: no pairs.
    """
    if len(gists) == 0:
        raise ValueError(
            "contrastive.weight is above 0, but no sampled block has a right neighbour: use longer documents"
        )
    distance = 1 - F.cosine_similarity(gists.float(), neighbours.float(), dim=-1)
    return F.relu(margin - distance).mean()
