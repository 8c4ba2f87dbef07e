"""Where scored segments of history mode lie in a document (method 3)."""

import numpy as np

SEGMENT, RECENCY = 128, 256  # S and R in tokens


def eligible_segments(length: int, block: int, segment: int = SEGMENT, recency: int = RECENCY) -> np.ndarray:
    """Starts on the block grid: the sink, one block to compress and R raw tokens lie before, S tokens from it on."""
    first = -(-(2 * block + recency) // block) * block
    return np.arange(first, length - segment + 1, block)


def draw_copied_blocks(rng, starts: np.ndarray, block: int, recency: int) -> np.ndarray:
    """One of the old blocks of each segment, to come back there: starts of segments -> starts of blocks."""
    return block * rng.integers(1, (starts - recency) // block)


def check_history(history: dict, block: int, min_tokens: int) -> None:
    """Segments and raw tokens lie on the block grid, and every document has room for one.

    Raises:
        ValueError: naming the setting.
    """
    for name in ("segment", "recency"):
        if history[name] < block or history[name] % block:
            raise ValueError(f"history.{name}={history[name]} is not allowed: a multiple of block_size={block}")
    if history["segments"] < 1:
        raise ValueError(f"history.segments={history['segments']} is not allowed: it must be 1 or more")
    what = f"history mode with history.recency={history['recency']} and history.segment={history['segment']}"
    check_room(what, 2 * block + history["recency"] + history["segment"], min_tokens)


def check_room(what: str, needed: int, min_tokens: int) -> None:
    """Raises: ValueError: ``what``, a setting with its value, needs longer documents."""
    if min_tokens < needed:
        raise ValueError(f"{what} does not fit into data.min_tokens={min_tokens}: a document needs {needed} tokens")
