"""Blocks that the base LM could not foresee."""

import torch.nn.functional as F
from torch import Tensor

from megactx.evaluation.policy import Policy, Seen


class Surprise(Policy):
    """Blocks whose tokens have the highest mean NLL behind the full context."""

    title = "most surprising blocks"

    def values(self, seen: Seen) -> Tensor:
        block = seen.tree.block_size
        nll = F.pad(seen.nll, (1, 0))[: seen.blocks * block]  # nothing comes before the first token
        return nll.view(seen.blocks, block).mean(1).float().cpu()
