"""Whether an old place would have paid already: what came last is read with the place in front and without it.

    [ sink ][ place ][ 224 tokens ][ newest 64 ]     against     [ sink ][ 224 tokens ][ newest 64 ]
                                    is likelier?                                        than here?

Text that shares its rare tokens with an old place is most often about the same and no more: prose loses by reading it
in place of its newest tokens. Where the place is what the text builds on, it says so of the newest 64 tokens too.
"""

import torch
from torch import Tensor

from megactx.lm import BaseLM
from megactx.lm.chunked_head import nll
from megactx.lm.masks import CAUSAL

TRIED, BEFORE = 64, 224  # newest tokens that a place must make likelier, and tokens that are read before these
# Nats a token that a place must win: half of it lets in what prose loses by, 0.15 loses what code wins.
PAYS = 0.1


class Trial:
    """Tries places by their base LM, which reads about 700 tokens for the first place and 400 for each one more.

    Args:
        base: frozen.
    """

    def __init__(self, base: BaseLM):
        self.base = base

    def paying(self, sink: Tensor, places: list[Tensor], newest: Tensor) -> list[bool]:
        """Which places make what came last likelier by ``PAYS``.

        Args:
            sink: ids that a window begins with.
            places: ids of each, one at least.
            newest: ids of the newest tokens that are read in any case; ``BEFORE`` and ``TRIED`` of them are used. A
                place is none of these.
        """
        before, last = newest[:-TRIED][-BEFORE:], newest[-TRIED:]
        alone = self._nll(torch.cat([sink, before]), last)
        return [alone - self._nll(torch.cat([sink, place, before]), last) > PAYS for place in places]

    @torch.no_grad()
    def _nll(self, before: Tensor, last: Tensor) -> float:
        """Mean NLL of tokens behind others, in nats."""
        ids = torch.cat([before, last]).long().to(self.base.model.device)[None]
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        hidden = self.base(self.base.embed(ids), positions, CAUSAL)
        return nll(self.base, hidden[0, -len(last) - 1 : -1], ids[0, -len(last) :]).mean().item()
