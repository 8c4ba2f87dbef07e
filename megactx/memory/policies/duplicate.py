"""Blocks whose tokens stand there again, in a newer block: the newest of them stays."""

import torch
from torch import Tensor


def choose(blocks) -> Tensor:
    """bool [N]."""
    newest: dict[bytes, int] = {}
    out = torch.zeros(len(blocks.opened), dtype=torch.bool)
    for number, content in blocks.contents():
        if content in newest:
            out[newest[content]] = True
        newest[content] = number
    return out
