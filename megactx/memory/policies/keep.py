"""Blocks that stay: those that a window has opened, and spans that a person names."""

import torch
from torch import Tensor


def choose(blocks, opened: int = 1, spans: str = "") -> Tensor:
    """bool [N].

    Args:
        opened: a block that was opened so often stays.
        spans: tokens ``START-STOP``, several joined by ``+``.

    Raises:
        ValueError: a span that is none.
    """
    out = blocks.opened >= opened
    for span in filter(None, str(spans).split("+")):
        start, dash, stop = span.partition("-")
        if not (dash and start.isdigit() and stop.isdigit() and int(start) < int(stop)):
            raise ValueError(f"keep: spans={span} is not allowed: START-STOP, in tokens")
        number = torch.arange(len(out))
        out = out | ((number >= int(start) // blocks.size) & (number * blocks.size < int(stop)))
    return out
