"""Where scored segments of history mode lie in a document (SPEC 3)."""

import numpy as np

SEGMENT, RECENCY = 128, 256  # S and R in tokens


def eligible_segments(length: int, block: int, segment: int = SEGMENT, recency: int = RECENCY) -> np.ndarray:
    """Starts on the block grid: the sink, one block to compress and R raw tokens lie before, S tokens from it on."""
    first = -(-(2 * block + recency) // block) * block
    return np.arange(first, length - segment + 1, block)
