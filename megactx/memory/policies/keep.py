"""Blocks that stay: those that a window has opened, spans that a person names, and what is known to be worth much."""

import torch
from torch import Tensor


def choose(blocks, opened: int = 1, spans: str = "", dnll: float | None = None, worth: float | None = None) -> Tensor:
    """bool [N].

    Args:
        opened: a block that was opened so often stays.
        spans: tokens ``START-STOP``, several joined by ``+``.
        dnll: a block whose collapse was measured to cost more nats stays; ``None``: that does not count.
        worth: a block whose tokens are worth more nats in LensNet's mean word stays; ``None``: that does not count.

    Raises:
        ValueError: a span that is none.
    """
    out = blocks.opened >= opened
    for least, known in ((dnll, blocks.dnll), (worth, blocks.worth)):
        if least is not None:
            out = out | (known > least)
    for span in filter(None, str(spans).split("+")):
        start, dash, stop = span.partition("-")
        if not (dash and start.isdigit() and stop.isdigit() and int(start) < int(stop)):
            raise ValueError(f"keep: spans={span} is not allowed: START-STOP, in tokens")
        number = torch.arange(len(out))
        out = out | ((number >= int(start) // blocks.size) & (number * blocks.size < int(stop)))
    return out
