"""Windows whose older text stands as gists, for a base LM and a GistNet that learn from each other.

    window   [ block 0 ][ block 1 ][ block 2 ] ... y(c) y(c+1) ... y(T-1)
    read     [ block 0 ][ g1 ][ g2 ] ...           y(c) y(c+1) ... y(T-2)
    scored      ^                         y(c)       ^               y(T-1)

Block 0 is the sink and stays as it is. A gist has a place of its block, and the last one predicts the token behind it.
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.gist import GistNet
from megactx.lm import BaseLM
from megactx.lm.masks import CAUSAL

GISTS, DROPPED = "gists", "dropped"


def drawn_cut(draw: random.Random, tokens: int, block: int) -> int:
    """c: where the older text of a window ends, on the grid, behind a quarter of it and before three quarters."""
    blocks = tokens // block
    return block * draw.randint(max(2, blocks // 4), max(2, 3 * blocks // 4))


def nll_behind(base: BaseLM, net: GistNet, batch: dict, cut: int, older: str) -> tuple[Tensor, Tensor]:
    """NLL of the tokens that rows predict, and which tokens they are.

    Args:
        net: its gists learn with the base LM, so they are at the scale of its embeddings of now.
        batch: ``ids`` and ``positions`` [B, T].
        cut: c, a multiple of K, at least 2 K.
        older: what stands for the blocks from 1 to c: ``gists``, or nothing (``dropped``).

    Returns:
        NLL [B, n] in nats, and the places [n] in the window of what is predicted; the first K - 1 are of the sink.
    """
    ids, positions, k = batch["ids"], batch["positions"], net.block_size
    embedded, width = base.embed(ids), base.width
    every = torch.arange(ids.shape[1], device=ids.device)
    old = every[k:cut]
    if older == GISTS:
        with torch.no_grad():
            net.embedding_rms = base.embedding_rms()
        inner = net.encode_block(embedded[:, k:cut].reshape(-1, k, width)).view(len(ids), -1, width).to(embedded.dtype)
        # A gist that is not behind its block's last token still predicts what comes behind the block.
        old = old[net.offset_in(k) :: k]
    else:
        inner, old = embedded[:, :0], old[:0]
    rows = torch.cat([embedded[:, :k], inner, embedded[:, cut:-1]], dim=1)
    places = torch.cat([every[:k], old, every[cut:-1]])
    hidden = base(rows, positions[:, places], CAUSAL)
    # The rows whose next token is known: of the sink all but its last, then from the last row before c on.
    first = k + len(old)
    chosen = torch.cat([hidden[:, : k - 1], hidden[:, first - 1 :]], dim=1)
    told = torch.cat([every[1:k], every[cut:]])
    nll = F.cross_entropy(base.logits(chosen).float().flatten(0, 1), ids[:, told].flatten(), reduction="none")
    return nll.view(len(ids), -1), told
