"""Documents that change their subject: consecutive segments of several real documents (curriculum stage 3)."""

import numpy as np

SEGMENT = (128, 512)  # tokens of a segment, shortest and longest; rounded to whole blocks


def interleaved(ids: np.ndarray, rng: np.random.Generator, block: int, pick) -> np.ndarray:
    """Segments of whole blocks, so that each starts on the block grid; the first is the beginning of ``ids``.

    Args:
        ids: int64 [T], a document that opens with BOS.
        pick: ``rng -> int64 [t]``, the next real document, with BOS, of at least two blocks.

    Returns:
        int64 [T]. A segment has 128 to 512 tokens, but at most half of T, and never the first block of a later
        document, so that BOS stands at the very beginning only.
    """
    longest = max(1, min(SEGMENT[1], len(ids) // 2) // block)
    shortest = min(longest, max(1, SEGMENT[0] // block))
    parts, size = [ids[: block * int(rng.integers(shortest, longest + 1))]], 0
    while (size := size + len(parts[-1])) < len(ids):
        source = pick(rng)
        whole = len(source) // block
        assert whole >= 2, "a document has the sink block and another one"
        count = min(int(rng.integers(shortest, longest + 1)), whole - 1)
        first = int(rng.integers(1, whole - count + 1))
        parts.append(source[first * block : (first + count) * block])
    return np.concatenate(parts)[: len(ids)]
