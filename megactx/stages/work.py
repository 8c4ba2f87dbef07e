"""How many floating-point operations a step of a gist stage takes, by formula."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megactx.gist.loss import Loss
from megactx.lm import BaseLM


@dataclass(frozen=True)
class Work:
    """Floating-point operations that a batch needs, recomputation left out.

    With P parameters of the base's layers, V D of its head, L layers of attention width A, documents of T tokens, N
    blocks each, C nets, H rows per branch, a branch at start s:

        teacher    2 P T + 2 L A T^2                     per document: forward, causal attention
        branches   2 (2 P + 4 L A (s + (H + 1) / 2))     per row: forward, and backward for activations alone, for the
                                                         base is frozen; no gradient enters the cached prefix
        head       2 V D (1 + 2 C)                       per scored row: the teacher, forward and backward of C students
        nets       3 FLOPs of a block                    per block: forward and backward (the contrastive term's
                                                         neighbours are left out); K + 1 times that for a span of
                                                         K^2 tokens, one gist of K gists

        history    2 (2 P + 4 L A c) + 2 V D (1 + 2 C)   per row and the columns c that it sees: K + M of the stream of
                                                         M carriers, R + S - 1 of a segment, which S scored ones end;
                                                         3 FLOPs of a block for each of the M
        recall     the same                              per row of a window [sink, gists, block, gists, raw, copy]

    A stage that trains its base and has no nets: 6 (P + V D) T + 6 L A T^2 per window.
    """

    body: int  # P
    head: int  # V D
    attention: int  # L A
    carriers: int = 0  # C
    horizon: int = 0  # H
    nets: int = 0  # of all nets for one block, forward
    block: int = 0  # K
    segment: int = 0  # S, of history mode; 0: it is off
    recency: int = 0  # R
    alone: bool = False  # history mode has all of the loss: no single block is replaced
    read: bool = False  # history mode has a share of it
    recall: bool = False  # blocks come back

    @classmethod
    def of_base(cls, base: BaseLM) -> "Work":
        """Of a stage without nets, or the part of the base in a stage that has a formula of its own."""
        config, model = base.config, base.model
        body = sum(p.numel() for p in model.get_decoder().parameters())
        body -= model.get_input_embeddings().weight.numel()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        head = model.get_output_embeddings().weight.numel()
        attention = config.num_hidden_layers * config.num_attention_heads * width
        return cls(body, head, attention)

    @classmethod
    def of_gists(cls, base: BaseLM, nets: nn.ModuleDict, losses: Iterable[Loss], horizon: int, windows) -> "Work":
        """Of nets that learn from these losses; ``windows``: S and R of history mode."""
        with torch.random.fork_rng():  # a net's dropout draws numbers
            flops = sum(net.flops_per_block(base) for net in nets.values())
        weight = {loss.name: loss.weight for loss in losses if loss.weight}
        sizes = windows if {"history", "recall"} & {*weight} else (0, 0)
        about = (len(nets), horizon, flops, next(iter(nets.values())).block_size, *sizes)
        own = cls.of_base(base)
        alone = not {"block", "contrastive"} & {*weight}
        read, recall = "history" in weight, "recall" in weight
        return cls(own.body, own.head, own.attention, *about, alone, read, recall)

    @torch.no_grad()
    def __call__(self, batch: dict) -> Tensor | float:
        """Of one batch, as a number on the batch's device; nothing waits for it."""
        if not self.carriers:
            b, t = batch["ids"].shape
            return float(6 * (self.body + self.head) * b * t + 6 * self.attention * b * t**2)
        lengths = batch["lengths"].double()
        work = 2 * self.body * lengths.sum() + 2 * self.attention * lengths.square().sum()  # the teacher
        # Blocks that a net encodes for each.
        for name, encoded in (("block_starts", 1), ("span_starts", self.block + 1)):
            if name not in batch or name == "block_starts" and self.alone:
                continue
            starts = batch[name].double()
            rows = starts.numel() * self.horizon
            seen = self.horizon * (starts + (self.horizon + 1) / 2).sum()  # columns, over the rows of one net
            work = work + 2 * self.carriers * (2 * self.body * rows + 4 * self.attention * seen)
            work = work + 2 * self.head * (1 + 2 * self.carriers) * rows + 3 * self.nets * encoded * starts.numel()
        return work + self._history(batch["segments"].double()) if self.segment and "segments" in batch else work

    def _history(self, starts: Tensor) -> Tensor:
        """Of segments at starts [B, N]."""
        k, scored = self.block, 2 * self.head * (1 + 2 * self.carriers)
        old = (starts - self.recency).div(k, rounding_mode="floor") - 1  # carriers that each segment sees
        most = old.max()  # all documents have as many
        work = 3 * self.nets * len(starts) * most

        def passed(rows: Tensor, columns: Tensor) -> Tensor:  # rows, and the columns that all of them see together
            return 2 * self.carriers * (2 * self.body * rows + 4 * self.attention * columns)

        if self.read:
            stream, rows = k + most, torch.full_like(starts, self.recency + self.segment - 1)
            work = work + len(starts) * passed(stream, stream * (stream + 1) / 2)
            work = work + passed(rows, rows * (k + old) + rows * (rows + 1) / 2).sum()
            work = work + scored * self.segment * starts.numel()
        if self.recall:
            rows = 3 * k + self.recency + old - 2
            work = work + passed(rows, rows * (rows + 1) / 2).sum() + scored * k * starts.numel()
            again = 2 * self.body * (k - 1) * starts.numel()  # over the full context, forward
            work = work + again + 4 * self.attention * (k - 1) * (starts + k / 2).sum()
        return work
