"""What a history's own tokens say comes next, mixed into what the base LM says: a memory that needs no room.

    ... [ the port of Alder is 48 ] ...  far back  ...  the port of Alder is |
                                ^ stood behind its last token, its last two, ..., its last five

    p = base's;  for n = 1, 2, ..., LONGEST:  p = (1 - share(n)) x p + share(n) x p(n)

p(n) is how often each token stood behind the last n tokens of the text, wherever they stood before; orders of which
there is no place leave p as it is (interpolated n-grams: Jelinek and Mercer 1980; of a text's own past: Kuhn and
De Mori 1990, Grave et al. 2017; of any length: Liu et al. 2024).

T tokens of a text, N of its last ones, B rows, V vocabulary.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .rare_tokens import NOTHING
from .repeats import LONGEST, LOOKED, Repeats, matches

# From so many last tokens on, the share of what followed them, chosen on texts of the tuning pack. So an end of two
# tokens counts 0.08 in all, one of eight 0.36, and a copy nearly all.
SHARES = ((LONGEST, 0.6), (2, 0.06), (1, 0.02))


def share(length: int) -> float:
    return next(value for least, value in SHARES if length >= least)


def continuations(text: Tensor) -> Iterator[tuple[float, Tensor]]:
    """For each number of last tokens of a text [T] that stood in it before, the fewest first: their share, and the
    tokens [P] that stood behind each place."""
    places, counts = matches(text)
    for length in range(1, 1 + (int(counts.max()) if len(counts) else 0)):
        tokens = text[places[counts >= length]]
        if len(tokens := tokens[tokens != NOTHING]):
            yield share(length), tokens


def mixed_nll(nll: Tensor, text: Tensor, within: int = LOOKED) -> Tensor:
    """NLL of the last tokens of a text where its own tokens tell, too.

    Args:
        nll: by the base, [N] in nats; NaN stays.
        text: ids [T], which end with these N.
        within: newest tokens before each that tell.
    """
    p, first = torch.exp(-nll.double()), len(text) - len(nll)
    for n, target in enumerate(text[first:]):
        for part, tokens in continuations(text[max(0, first + n - within) : first + n]):
            p[n] = (1 - part) * p[n] + part * (tokens == target).double().mean()
    return -torch.log(p).to(nll.dtype)


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
            for part, tokens in continuations(self._text(row, behind[row, :count])):
                token, often = tokens.long().to(out.device).unique(return_counts=True)
                out[row] += math.log1p(-part)
                out[row, token] = torch.logaddexp(out[row, token], torch.log(part * often / len(tokens)))
        return out

    def _text(self, row: int, behind: Tensor) -> Tensor:
        return torch.cat([self.repeats.text(row), behind.to("cpu", torch.int32)])[-LOOKED:]
