"""Blocks whose collapse was measured to cost next to nothing, see ``apps.curation measure``."""

from torch import Tensor


def choose(blocks, nats: float = 0.0) -> Tensor:
    """bool [N]. Blocks that were not measured stay. ``nats``: per token of what follows the block, at most."""
    return blocks.dnll <= nats
