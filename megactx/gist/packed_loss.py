"""The loss of compressors on sampled blocks: what their carriers do to the base LM, in one packed pass (method 3, 4).

C compressors, B documents, N blocks, H horizon, K block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megactx.lm import BaseLM
from megactx.lm.chunked_head import score
from megactx.lm.prefill import Prefill, blocks, rows_at

from .carrier import Compressor, Slots, Vectors
from .reading import read_carriers
from .substitution import check_blocks

SEAM = 4  # offsets right behind the block, which one vector that says how the block ended serves; then comes the body


def substitution_loss(
    base: BaseLM,
    nets: Sequence[Compressor],
    teacher: Prefill,
    starts: Tensor,
    lengths: Tensor,
    horizon: int,
    objective: str = "kl",
    level: int = 1,
    seam_weight: float = 1.0,
) -> tuple[Tensor, Tensor, list[Vectors | Slots]]:
    """-> (loss per net [C] with gradient, dNLL per net [C], carriers of the blocks).

    Args:
        nets: of one block size.
        teacher: of these documents. Branches read its ``cache`` and are compared with its ``hidden``: where the base LM
            has adapters, the first is from a pass with them and the second from one without.
        starts: of blocks [B, N], or with ``level`` 2 of spans of K^2 tokens, for which gists of gists stand.
        lengths: tokens of each document, [B].
        objective: ``kl`` or ``delta_nll``.
        seam_weight: of the first ``SEAM`` offsets in the loss, see ``offset_weights``.

    Raises:
        ValueError: a block that is not eligible, or an unknown objective.
    """
    tokens = nets[0].block_size ** level
    check_blocks(starts, lengths, tokens, horizon)
    settings = {} if level == 1 else {"level": level}
    carriers = [net.compress(base, teacher, starts, **settings) for net in nets]
    hidden = read_carriers(base, teacher, starts, carriers, tokens, horizon)
    loss, numbers = score(
        base,
        hidden.flatten(1, 3),
        rows_at(teacher.hidden, starts + tokens - 1, horizon).flatten(0, 2),
        blocks(teacher.ids, starts + tokens, horizon).flatten(),
        objective,
    )
    weighted = loss.view(-1, horizon) * offset_weights(horizon, seam_weight, loss.device)
    found = []
    for values in (weighted, numbers["nll"] - numbers["full"]):
        each = zip(values.view(len(carriers), -1, horizon), carriers, strict=True)
        # What has no output row has no say in the first token either.
        found.append(torch.stack([rows[:, carrier.first :].mean() for rows, carrier in each]))
    return *found, carriers


def offset_weights(horizon: int, seam_weight: float, device=None) -> Tensor:
    """Weights of the offsets h = 0 .. H-1 in the loss, [H], 1 on average.

    Nearly all of the loss is at the seam (method 5), so what a gist says about the rest is learned late: below 1, the
    ``SEAM`` first offsets count ``seam_weight`` and the others as much more. A horizon that is all seam has no weights.
    """
    weights = torch.ones(horizon, device=device)
    if horizon > SEAM:
        weights[:SEAM] = seam_weight
        weights[SEAM:] = (horizon - SEAM * seam_weight) / (horizon - SEAM)
    return weights
