"""Blocks that were made long ago."""

import time

from torch import Tensor


def choose(blocks, days: float = 365) -> Tensor:
    """bool [N]. Blocks whose time is not known are not old."""
    return (blocks.time > 0) & (blocks.time < time.time() - days * 86_400)
