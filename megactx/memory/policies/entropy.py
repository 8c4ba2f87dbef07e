"""Blocks that carry the least information: what says little more than what is said everywhere goes first.

The information of a block is the mean self-information of its tokens, -log p (Shannon 1948, A Mathematical Theory of
Communication), in nats. p is the share of that token among all tokens of the tree, so every block has it and no model
is needed; with ``by=nll`` it is what the base LM makes of the tokens behind those before them, of the blocks that
``apps.curation measure`` has measured. Little information is not little use: the words of a licence are told again
everywhere, a secret code of four digits is short.
"""

import numpy as np
import torch
from torch import Tensor


def choose(blocks, share: float = 0.25, by: str = "tokens") -> Tensor:
    """bool [N]. Blocks of which it is not known stay.

    Args:
        share: of the blocks that may be touched and of which it is known, how many go.
        by: ``tokens`` or ``nll``.

    Raises:
        ValueError: a share that is none, or another word.
    """
    if not 0 <= share <= 1 or by not in ("tokens", "nll"):
        raise ValueError(f"entropy: share={share}, by={by} is not allowed: 0 to 1, tokens or nll")
    told = blocks.nll if by == "nll" else information(blocks)
    known = (blocks.may & ~told.isnan()).nonzero()[:, 0]
    order = known[told[known].argsort(stable=True)][: int(share * len(known))]
    return torch.zeros(len(told), dtype=torch.bool).index_fill_(0, order, True)


def information(blocks) -> Tensor:
    """Nats per token, [N]; NaN where the tokens were taken away."""
    counts = np.zeros(0, dtype=np.int64)
    for _, tokens in blocks.kept():
        found = np.bincount(tokens.ravel(), minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    surprise = np.log(max(1, counts.sum())) - np.log(np.maximum(counts, 1))
    out = torch.full((len(blocks.opened),), torch.nan)
    for numbers, tokens in blocks.kept():
        out[numbers] = torch.from_numpy(surprise[tokens].mean(1)).float()
    return out
