"""A document that is read once, so that many branches of it can be read in one packed pass, under MegaAttention too.

    trunk     [ settled leaves ... ][ live leaves ..................... ]     read among summaries and strips
    kept        keys and values of the leaves alone
    branch      [ all leaves before s ] [ gist of the block at s ] y0 y1 ...

Live rows see every leaf before them and no summary, and no row before a live block sees anything of it. So a branch
that begins in the live region reads exactly what its rows read in the window that shows the document's tokens, and that
gist in place of its block. The teacher, which has the block, is the trunk itself.

B documents, T tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.gist import GistNet
from megactx.lm import BaseLM
from megactx.lm.prefill import Prefill, prefill

from .passes import KeysValues, by_segments
from .pyramid import PLAIN, Attention
from .tree import MegaContextTree
from .working_context import WorkingContext


@torch.no_grad()
def trunk(
    base: BaseLM,
    gistnet: GistNet,
    ids: Tensor,
    lengths: Tensor,
    attention: Attention = PLAIN,
    with_states: bool = False,
) -> Prefill:
    """``prefill`` under an attention.

    Args:
        gistnet: whose gists are the summaries, as it is now, without dropout; with plain attention any compressor.
        ids: of the documents [B, T], padded on the right.
        lengths: their tokens [B].
        with_states: with states, which plain attention alone gives.

    Returns:
        What ``prefill`` does. With MegaAttention the padding is 0, and ``first`` says where branches may begin. Where
        everything is live it is what plain attention gives, bit for bit.

    Raises:
        ValueError: a sliding window, see ``Attention.live_from``; states under MegaAttention.
    """
    if attention.kind == "plain":
        return prefill(base, ids, with_states)
    if with_states:
        raise ValueError(f"attention.kind={attention.kind} is not allowed with nets that read the base LM's states")
    first = attention.live_from(lengths)
    if not first.any():
        return prefill(base, ids)
    tree = MegaContextTree.from_tokens(ids, gistnet, base, lengths)
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    context = WorkingContext(tree, torch.zeros_like(index), index, lengths, ids.shape[1])
    kept: list[KeysValues] = []
    hidden = by_segments(attention.pyramid(context), base, attention.summaries, kept)
    layers = zip(*kept, strict=True)  # of each, keys and values of all documents
    cache = tuple(tuple(_padded(rows, ids.shape[1]) for rows in zip(*layer, strict=True)) for layer in layers)
    return Prefill(ids, hidden, cache, first=first[:, None])


def _padded(rows: tuple[Tensor, ...], tokens: int) -> Tensor:
    """Keys or values of a layer, of each document [1, heads, its tokens, head width] -> [B, heads, T, head width]."""
    return torch.cat([F.pad(row, (0, 0, 0, tokens - row.shape[2])) for row in rows])


def check_room(attention: Attention, tokens: int, horizon: int) -> None:
    """See that every document that has room for a span of ``tokens`` and ``horizon`` more has it in its live region.

    Raises:
        ValueError: it has not; or a sliding window, see ``Attention.live_from``.
    """
    attention.live_from(0)  # refuses a sliding window
    # Borders of segments lie on a grid, spans on their own: as many tokens may be lost between the two.
    needed = 2 * tokens - math.gcd(tokens, attention.segment) + horizon
    if attention.kind == "mega" and attention.live < needed:
        raise ValueError(
            f"attention.live={attention.live} is not allowed: at least {needed}, so that {tokens} tokens that become a"
            f" gist and horizon.tokens={horizon} behind them are live wherever borders of segments fall"
        )
