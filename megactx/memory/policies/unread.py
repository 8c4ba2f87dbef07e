"""Blocks that no window has opened since they were new."""

import torch
from torch import Tensor


def choose(blocks, behind: int = 65_536) -> Tensor:
    """bool [N]. ``behind``: tokens, counted from the end, that are too new to judge."""
    number = torch.arange(len(blocks.opened))
    return (blocks.opened == 0) & ((number + 1) * blocks.size <= blocks.tokens - behind)
