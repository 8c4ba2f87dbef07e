"""Old blocks that share rare tokens with the newest ones: BM25 (Robertson and Zaragoza, 2009), every block a document.

    ... [ def parse(header, offset) ... ] ...  far back  ... x = parse(header, |
          shares parse, header

A function that is called, a name that comes back: what was said of it is worth more than the oldest of the newest
tokens. A library's index would be made anew for each question, since each adds a block; counting tokens is as fast.

N blocks, K tokens of a block.
"""

import torch
from torch import Tensor

ASKS = 32  # newest tokens that are looked for
SATURATION = 1.5  # k1: that a token stands in a block again counts ever less
# What the first and the second place must share, in tokens that one block alone has. What shares less costs as often as
# it gives: chosen on texts of two bases.
LEAST = (3.0, 6.0)
NOTHING = -1  # a token that was taken away


def places(blocks: Tensor, asked: Tensor) -> list[int]:
    """The blocks [N, K] that share most with the tokens asked [A], the best first; none that shares too little."""
    if not len(blocks):
        return []
    shared, at = shares(blocks, asked).topk(min(len(LEAST), len(blocks)))
    found = []
    for value, block, least in zip(shared.tolist(), at.tolist(), LEAST, strict=False):
        if value < least:
            break
        found.append(block)
    return found


def shares(blocks: Tensor, asked: Tensor) -> Tensor:
    """BM25 of each block, over what a token counts that one block alone has: [N]."""
    asked = asked[asked != NOTHING].unique()
    out = torch.zeros(len(blocks), dtype=torch.float64)
    if not len(asked):
        return out
    # One look for all tokens of a text of a million: of each token which of the asked ones it is. -1 is the last one.
    which = torch.full((int(max(blocks.max(), asked.max())) + 2,), -1)
    which[asked.long()] = torch.arange(len(asked))
    which = which[blocks.long()]
    there = which >= 0
    pair = there.nonzero()[:, 0] * len(asked) + which[there]
    pair, count = pair.unique(return_counts=True)
    block, token = pair // len(asked), pair % len(asked)
    rarity = _rarity(len(blocks), token.bincount(minlength=len(asked)))
    out.index_add_(0, block, rarity[token] * count * (SATURATION + 1) / (count + SATURATION))
    return (out / _rarity(len(blocks), torch.tensor(1))).round(decimals=6)  # three tokens are three, not 2.9999999


def _rarity(n: int, having: Tensor) -> Tensor:
    return torch.log(1 + (n - having.double() + 0.5) / (having + 0.5))
