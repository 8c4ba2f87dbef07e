"""Whether what the model expects next tells which blocks are worth opening: the question that LensNet answers.

    window of the cold start -> every gist of a block is opened, one at a time, and the next H tokens are read
    value of opening it     against     cosine of its gist with the foretold one

Rank correlations within each text, in the mean over texts. ``beside``: the partial rank correlation, given how like the
block's tokens are to the newest ones, which LensNet sees already.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.focus import moves
from megactx.focus.edit_labels import measure_values
from megactx.focus.lensnet import likeness
from megactx.lm import BaseLM
from megactx.lm.prefill import prefill
from megactx.memory import MegaContextTree, WorkingContext
from megactx.memory.encoding import Encoder
from megactx.memory.prediction import CONTROL, Readout

from .bootstrap import mean_interval

FORETOLD, NEWEST, TOKENS = "readout", "newest gist again", "tokens like the newest"
FEWEST = 4  # gists of blocks in a window, below which a text has no part in it


@torch.no_grad()
def signals(
    base: BaseLM, readout: Readout, encoder: Encoder, ids: Tensor, horizon: int, share: float
) -> dict[str, Tensor] | None:
    """Of a text ids [T]: what opening each block is worth, and what might say so, [N] each; ``None``: too few blocks.

    Args:
        horizon: H, tokens that are read behind the window; they are the last ones of the text.
        share: entries of the window over the tokens that it stands for.
    """
    cursor = len(ids) - horizon
    tree = MegaContextTree.from_tokens(ids[None, :cursor], encoder, base)
    try:
        context = WorkingContext.recency(tree, int(share * cursor))
    except ValueError:  # not even its coarsest view fits
        return None
    edits = moves(context).edits(context)
    edits = edits[edits.expand & (edits.lod == 1)]
    if len(edits) < FEWEST:
        return None
    gists = F.normalize(tree.gists(1)[0].float(), dim=-1)
    state, newest = prefill(base, ids[None, :cursor]).hidden[0, -1].float(), gists[-1]
    directions = {FORETOLD: readout(state), CONTROL: readout.from_newest(tree.gists(1)[0][-1].float()), NEWEST: newest}
    found = {name: gists[edits.index] @ direction for name, direction in directions.items()}
    column = (context.lods()[0] == 1).nonzero()[:, 0]
    of_block = dict(zip(context.index[0, column].tolist(), likeness(context)[0, column].tolist(), strict=True))
    found[TOKENS] = torch.tensor([of_block[index] for index in edits.index.tolist()])
    return {name: values.cpu() for name, values in found.items()} | {
        "worth": measure_values(base, context, edits, ids[None, cursor:])[0].cpu()
    }


def correlations(texts: list[dict[str, Tensor]]) -> dict[str, dict[str, dict]]:
    """Texts of ``signals`` -> signal -> ``rank``: with the worth; ``beside``: the same given ``TOKENS``; intervals."""
    owner, found = torch.arange(len(texts)), {}
    for name in (FORETOLD, CONTROL, NEWEST, TOKENS):
        own = torch.tensor([ranked(text[name], text["worth"]) for text in texts])
        found[name] = {"rank": mean_interval(owner, own)}
        if name != TOKENS:
            both = [(text[name], text["worth"], text[TOKENS]) for text in texts]
            found[name]["beside"] = mean_interval(owner, torch.tensor([partial(*one) for one in both]))
    return found


def ranked(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation; 0 where one of them says nothing."""
    from torchmetrics.functional import spearman_corrcoef

    return float(spearman_corrcoef(a.float(), b.float()).nan_to_num(0.0))


def partial(a: Tensor, b: Tensor, given: Tensor) -> float:
    """Rank correlation of a and b, of which what ``given`` says of both is taken out."""
    ab, ag, bg = ranked(a, b), ranked(a, given), ranked(b, given)
    left = (1 - ag**2) * (1 - bg**2)
    return (ab - ag * bg) / left**0.5 if left > 1e-9 else 0.0
