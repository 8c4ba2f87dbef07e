"""What one gist does in the place of its block: the base LM's NLL of what follows, in one packed pass (method 3, 4)."""

from typing import Literal

import torch
from torch import Tensor

from megactx.framework.config.types import NonNegative, Share, declared
from megactx.gist.loss import Context, Loss
from megactx.gist.reading import read_carriers
from megactx.gist.substitution import check_blocks
from megactx.lm.chunked_head import OBJECTIVES, score
from megactx.lm.prefill import blocks, rows_at

SEAM = 4  # offsets right behind the block: how the block ended says most about them. The body comes behind the seam.


@declared("loss.block")
class Block(Loss):
    """KL from the full context behind single blocks, each replaced by its carrier.

    Branches read the ``cache`` of the prefill and are compared with its ``hidden``. If the base LM has adapters,
    ``cache`` is from a pass with them and ``hidden`` from a pass without them.

    Args:
        weight: its share of the sum.
        objective: ``kl`` or ``delta_nll``.
        seam_weight: of the first ``SEAM`` offsets of the horizon, see ``offset_weights``.

    Raises:
        ValueError: an unknown objective, a weight outside 0 to 1; when called on a CPU, a block that is not eligible.
    """

    needs = ("block_starts",)
    starts, lod = "block_starts", 1  # the entry of the batch, and what its spans are: K^lod tokens

    def __init__(self, weight: NonNegative = 1.0, objective: Literal[OBJECTIVES] = "kl", seam_weight: Share = 1.0):
        super().__init__(weight)
        self.objective, self.seam_weight = objective, seam_weight

    def __call__(self, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        losses, dnll = self.per_net(context)
        return losses, self.numbers(context, losses, dnll)

    def per_net(self, context: Context) -> tuple[Tensor, Tensor]:
        """-> (loss per net [C] with gradient, dNLL per net [C] in nats)."""
        batch, prefill, horizon = context.batch, context.prefill, context.horizon
        starts, tokens = batch[self.starts], context.block**self.lod
        if not starts.is_cuda:  # the host would wait for a card in every step; ``SpanBatches`` draws no others
            check_blocks(starts, batch["lengths"], tokens, horizon, prefill.first)
        carriers = context.carriers(starts, self.lod)
        hidden = read_carriers(context.base, prefill, starts, carriers, tokens, horizon)  # [C, B, N, H, D]
        loss, numbers = score(
            context.base,
            hidden.flatten(1, 3),
            rows_at(prefill.hidden, starts + tokens - 1, horizon).flatten(0, 2),
            blocks(prefill.ids, starts + tokens, horizon).flatten(),
            self.objective,
        )
        weighted = loss.view(-1, horizon) * offset_weights(horizon, self.seam_weight, loss.device)
        found = []
        for values in (weighted, numbers["nll"] - numbers["full"]):
            each = zip(values.view(len(carriers), -1, horizon), carriers, strict=True)
            # A carrier without an output row is not asked for the first token.
            found.append(torch.stack([rows[:, carrier.first :].mean() for rows, carrier in each]))
        return tuple(found)

    def flops(self, batch: dict, work) -> Tensor:
        starts = batch[self.starts].double()
        each = work.horizon + work.slots - 1  # of several vectors only the last one predicts a token
        # A branch at start s: its rows see s columns, and each other.
        columns = each * (starts + (each + 1) / 2).sum()
        return work.passed(starts.numel() * each, columns) + work.scored(starts.numel() * work.horizon)

    def encoded(self, batch: dict, block: int) -> dict[str, int]:
        # A span of K^2 tokens is K blocks, and one gist of their gists.
        return {self.starts: batch[self.starts].numel() * (1 if self.lod == 1 else block + 1)}


def offset_weights(horizon: int, seam_weight: float, device=None) -> Tensor:
    """Weights of the offsets h = 0 .. H-1 in the loss, [H], 1 on average.

    Nearly all of the loss is at the seam (method 5), so what a gist says about the rest is learned late. With a
    ``seam_weight`` below 1 the first ``SEAM`` offsets count less, and the others so much more. A horizon that is all
    seam has equal weights.
    """
    weights = torch.ones(horizon, device=device)
    if horizon > SEAM:
        weights[:SEAM] = seam_weight
        weights[SEAM:] = (horizon - SEAM * seam_weight) / (horizon - SEAM)
    return weights
