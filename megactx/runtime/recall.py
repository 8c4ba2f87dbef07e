"""What a history's own tokens say comes next, mixed into what the base LM says: a memory that needs no room.

    ... [ the port of Alder is 48 ] ...  far back  ...  the port of Alder is |
                                ^ stood behind the longest end: p_history

    p = (1 - share) x p_base + share x p_history

What followed each place where the end of the text stood before counts alike (infini-gram, Liu et al. 2024; the mixture
as of a cache, Grave et al. 2017). How much of it counts is told by the length of that end alone: chosen on texts that
no ledger measures, by the likelihood of their tokens.

T tokens of a text, N of its last ones, B rows, V vocabulary.
"""

import math

import torch
from torch import Tensor

from .rare_tokens import NOTHING
from .repeats import LOOKED, Repeats, ends

# Of each length of an end, from so many tokens on: the share of what followed it.
SHARES = ((16, 0.8), (6, 0.25), (4, 0.2), (2, 0.06), (1, 0.02))


def continuations(text: Tensor) -> tuple[float, Tensor]:
    """The tokens [P] that stood behind each place where the end of a text [T] stood before, and their share."""
    length, places = ends(text)
    tokens = text[places]
    return next((share for least, share in SHARES if length >= least), 0.0), tokens[tokens != NOTHING]


def mixed_nll(nll: Tensor, text: Tensor, within: int = LOOKED) -> Tensor:
    """NLL of the last tokens of a text where its own tokens tell, too.

    Args:
        nll: by the base, [N] in nats; NaN stays.
        text: ids [T], which end with these N.
        within: newest tokens before each that tell.
    """
    out, first = nll.double(), len(text) - len(nll)
    for n in range(len(nll)):
        share, tokens = continuations(text[max(0, first + n - within) : first + n])
        if len(tokens):
            told = share * (tokens == text[first + n]).double().mean()
            out[n] = -torch.log((1 - share) * torch.exp(-out[n]) + told)
    return out.to(nll.dtype)


class Recall:
    """Mixes what rows of a tree say of what comes next.

    Args:
        repeats: of the tree.
    """

    def __init__(self, repeats: Repeats):
        self.repeats = repeats

    def nll(self, nll: Tensor, behind: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """See ``mixed_nll``.

        Args:
            nll: [B, N], of which ``new`` [B] are there.
            behind: tokens behind each row of the tree, [B, K], of which ``old`` [B] stand before these.
        """
        out = nll.clone()
        for row, (first, count) in enumerate(zip(old.tolist(), new.tolist(), strict=True)):
            out[row, :count] = mixed_nll(nll[row, :count], self._text(row, behind[row, : first + count]))
        return out

    def logits(self, logits: Tensor, behind: Tensor, counts: Tensor) -> Tensor:
        """Logits [B, V] of the next token -> log probabilities.

        Args:
            behind: tokens behind each row of the tree, [B, K], of which ``counts`` [B] are there.
        """
        out = logits.log_softmax(-1)
        for row, count in enumerate(counts.tolist()):
            share, tokens = continuations(self._text(row, behind[row, :count]))
            if len(tokens):
                token, count = tokens.long().to(out.device).unique(return_counts=True)
                out[row] += math.log1p(-share)
                out[row, token] = torch.logaddexp(out[row, token], torch.log(share * count / len(tokens)))
        return out

    def _text(self, row: int, behind: Tensor) -> Tensor:
        return torch.cat([self.repeats.text(row), behind.to("cpu", torch.int32)])[-LOOKED:]
