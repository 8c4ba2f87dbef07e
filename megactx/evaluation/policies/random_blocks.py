"""Any blocks."""

import torch
from torch import Tensor

from megactx.evaluation.policy import Policy, Seen


class RandomBlocks(Policy):
    """Blocks that are drawn evenly, the same ones at every budget."""

    title = "random blocks"

    def values(self, seen: Seen) -> Tensor:
        return torch.rand(seen.blocks, generator=torch.Generator().manual_seed(seen.number))
