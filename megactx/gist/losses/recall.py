"""A block that stands in tokens among gists of all others comes back: gists must not get in its way (method 4)."""

import torch
from torch import Tensor

from megactx.framework.config.types import Count, NonNegative, declared
from megactx.gist.loss import Context, Loss
from megactx.gist.recall import full, mixed
from megactx.lm.chunked_head import score
from megactx.lm.prefill import blocks

from .history import as_drawn, old_counts, old_encoded, old_of


@declared("loss.recall")
class Recall(Loss):
    """NLL of old blocks that come back word for word, less their NLL over the full context.

    It is not the KL from the full context: that has more text that could go on, and so copies less surely itself.

    Args:
        weight: its share of the sum; 0.03 costs nothing, 0.1 copies better.
        recency: R, raw tokens before the copy. It is that of history mode, whose carriers are used again.
    """

    needs = ("segments", "copied_blocks")
    all_vectors = windows = True

    def __init__(self, weight: NonNegative = 0.0, recency: Count = 256):
        super().__init__(weight)
        self.recency = recency

    def check_data(self, datamodule, nets) -> None:
        if self.weight:
            as_drawn(self.setting, datamodule, recency=self.recency)

    def __call__(self, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        base, prefill, block = context.base, context.prefill, context.block
        starts, copied_blocks = context.batch["segments"], context.batch["copied_blocks"]
        old = old_of(context, self.recency)
        each = context.carriers(old)
        hidden = [mixed(base, prefill, starts, copied_blocks, old, own, block, self.recency) for own in each]
        again = blocks(prefill.ids, copied_blocks, block).flatten()
        known = full(base, prefill, starts, copied_blocks, block).flatten(0, 2)
        losses = score(base, torch.stack(hidden).flatten(1, 3), known, again, "delta_nll")[0].mean(dim=1)
        return losses, self.numbers(context, losses, losses)

    def flops(self, batch: dict, work) -> Tensor:
        starts, k = batch["segments"].double(), work.block
        # A window is [sink, gists, block, gists, raw, copy].
        rows = 3 * k + self.recency + old_counts(starts, k, self.recency) - 2
        again = (k - 1) * starts.numel()  # the copy over the full context
        return (
            work.passed(rows.sum(), (rows * (rows + 1) / 2).sum())
            + work.scored(k * starts.numel())
            + work.known(again, (k - 1) * (starts + k / 2).sum())
        )

    def encoded(self, batch: dict, block: int) -> dict[str, Tensor]:
        return old_encoded(batch["segments"], block, self.recency)
