"""What all gists of a history do together: segments are read behind it, with every old block compressed (method 3)."""

from typing import Literal

import torch
from torch import Tensor

from megactx.framework.config.types import Count, NonNegative, declared
from megactx.gist.history import check_segments, old_blocks, with_carriers, with_everything
from megactx.gist.loss import Context, Loss
from megactx.lm.chunked_head import OBJECTIVES, score
from megactx.lm.prefill import blocks


@declared("loss.history")
class History(Loss):
    """KL from the full context over segments of text, every old block before them compressed: history mode (method 3).

    Args:
        weight: its share of the sum.
        segments: scored segments per document; the data draws them.
        segment: S, scored tokens of a segment.
        recency: R, raw tokens before it; all older blocks are compressed.
        objective: ``kl`` or ``delta_nll``.

    Raises:
        ValueError: an unknown objective, a weight below 0; when called, a segment that is not eligible.
    """

    needs = ("segments",)
    windows = True

    def __init__(
        self,
        weight: NonNegative = 0.0,
        segments: Count = 2,
        segment: Count = 128,
        recency: Count = 256,
        objective: Literal[OBJECTIVES] = "kl",
    ):
        super().__init__(weight)
        self.segment, self.recency, self.objective = segment, recency, objective

    def __call__(self, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        starts, prefill = context.batch["segments"], context.prefill
        sizes = (context.block, self.segment, self.recency)
        check_segments(starts, context.batch["lengths"], *sizes)
        each = context.carriers(old_of(context, self.recency))
        hidden = torch.stack([with_carriers(context.base, prefill, starts, own, *sizes) for own in each])
        loss, numbers = score(
            context.base,
            hidden.flatten(1, 3),
            with_everything(prefill, starts, self.segment).flatten(0, 2),
            blocks(prefill.ids, starts, self.segment).flatten(),
            self.objective,
        )
        losses = loss.mean(dim=1)
        return losses, self.numbers(context, losses, (numbers["nll"] - numbers["full"]).mean(dim=1))

    def flops(self, batch: dict, work) -> Tensor:
        starts = batch["segments"].double()
        old = old_counts(starts, work.block, self.recency)
        old = work.slots * old
        stream = work.block + old.max()  # the sink and the carriers, for every document as many
        rows = torch.full_like(starts, self.recency + self.segment - 1)
        columns = (rows * (work.block + old) + rows * (rows + 1) / 2).sum()
        return (
            len(starts) * work.passed(stream, stream * (stream + 1) / 2)
            + work.passed(rows.sum(), columns)
            + work.scored(self.segment * starts.numel())
        )

    def encoded(self, batch: dict, block: int) -> dict[str, Tensor]:
        return old_encoded(batch["segments"], block, self.recency)

    def check_data(self, datamodule, nets) -> None:
        if self.weight:
            as_drawn(self.setting, datamodule, segment=self.segment, recency=self.recency)


def as_drawn(setting: str, datamodule, **sizes: int) -> None:
    """See that the data draws segments for these sizes, so that every segment has room.

    Raises:
        ValueError: it draws them for others.
    """
    for name, value in sizes.items():
        if (drawn := datamodule.history[name]) != value:
            raise ValueError(f"{setting}.{name}={value}, but datamodule.history.{name}={drawn}: set them alike")


def old_of(context: Context, recency: int) -> Tensor:
    """Starts [B, M] of all blocks that a segment of the batch sees compressed; the same tensor for all losses."""
    return context.kept(f"old blocks {recency}", lambda: old_blocks(context.batch["segments"], context.block, recency))


def old_counts(starts: Tensor, block: int, recency: int) -> Tensor:
    """How many carriers each segment at starts [B, N] sees."""
    return (starts - recency).div(block, rounding_mode="floor") - 1


def old_encoded(starts: Tensor, block: int, recency: int) -> dict[str, Tensor]:
    """What ``old_of`` makes nets encode: of every document as many blocks as the longest history has."""
    return {f"old blocks {recency}": len(starts) * old_counts(starts, block, recency).max()}
