"""The oldest blocks, until what is left of tokens and gists fits so many bytes."""

import torch
from torch import Tensor


def choose(blocks, megabytes: float) -> Tensor:
    """bool [N]. Blocks that were opened come last."""
    over = max(0, blocks.bytes - int(megabytes * 1e6))
    count = min(-(-over // blocks.freed), len(blocks.opened))
    order = (blocks.opened.long() * len(blocks.opened) + torch.arange(len(blocks.opened))).argsort()
    order = order[blocks.may[order]][:count]
    return torch.zeros(len(blocks.opened), dtype=torch.bool).index_fill_(0, order, True)
