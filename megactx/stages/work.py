"""How many floating-point operations a step of a gist stage takes, by formula."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megactx.gist.loss import Loss
from megactx.lm import BaseLM
from megactx.memory.pyramid import PLAIN, Attention


@dataclass(frozen=True)
class Work:
    """Floating-point operations that a batch needs, recomputation left out.

    With P parameters of the base's layers, V D of its head, L layers of attention width A, documents of T tokens and C
    nets:

        teacher    2 P T + 2 L A T^2             per document: forward, causal attention
        passed     2 (2 P + 4 L A c)             per row of a net and the columns c that it sees: forward, and backward
                                                 for activations alone, for the base is frozen; no gradient enters the
                                                 cached prefix
        scored     2 V D (1 + 2 C)               per scored row: the teacher, forward and backward of C students
        nets       3 FLOPs of a block            per block that becomes a gist: forward and backward

    Under MegaAttention the L A T^2 of a document whose first M tokens are settled is L A (T^2 - M^2 + M S), S being the
    tokens of a segment. Left out are summaries and strips: to make them, to read them, and to see them.

    Each loss says which rows it passes and scores, and which blocks it encodes (``Loss.flops``, ``Loss.encoded``).

    A stage that trains its base and has no nets: 6 (P + V D) T + 6 L A T^2 per window.
    """

    body: int  # P
    head: int  # V D
    attention: int  # L A
    carriers: int = 0  # C
    horizon: int = 0  # H
    nets: int = 0  # of all nets for one block, forward
    block: int = 0  # K
    losses: tuple[Loss, ...] = ()  # those with a weight
    slots: float = 1.0  # vectors of a block, mean over the nets
    reading: Attention = PLAIN  # of the documents

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
    def of_gists(
        cls, base: BaseLM, nets: nn.ModuleDict, losses: Iterable[Loss], horizon: int, attention: Attention = PLAIN
    ) -> "Work":
        """Of nets that learn from these losses, from documents that are read so."""
        with torch.random.fork_rng():  # a net's dropout draws numbers
            flops = sum(net.flops_per_block(base) for net in nets.values())
        own, block = cls.of_base(base), next(iter(nets.values())).block_size
        learned = tuple(loss for loss in losses if loss.weight)
        slots = sum(net.slots for net in nets.values()) / len(nets)
        return cls(own.body, own.head, own.attention, len(nets), horizon, flops, block, learned, slots, attention)

    @torch.no_grad()
    def __call__(self, batch: dict) -> Tensor | float:
        """Of one batch, as a number on the batch's device; nothing waits for it."""
        if not self.carriers:
            b, t = batch["ids"].shape
            return float(6 * (self.body + self.head) * b * t + 6 * self.attention * b * t**2)
        lengths = batch["lengths"].double()
        settled = self.reading.live_from(lengths)
        pairs = lengths.square() - settled.square() + settled * self.reading.segment
        work = 2 * self.body * lengths.sum() + 2 * self.attention * pairs.sum()  # the teacher
        encoded = {}  # no carrier is made twice, whatever many losses read it
        for loss in self.losses:
            if {*loss.needs} <= batch.keys():
                work, encoded = work + loss.flops(batch, self), encoded | loss.encoded(batch, self.block)
        return work + 3 * self.nets * sum(encoded.values())

    def passed(self, rows, columns):
        """Of rows of every net; ``columns``: that all of them see, together."""
        return 2 * self.carriers * (2 * self.body * rows + 4 * self.attention * columns)

    def scored(self, rows):
        return 2 * self.head * (1 + 2 * self.carriers) * rows

    def known(self, rows, columns):
        """Of rows that the teacher reads besides its documents."""
        return 2 * self.body * rows + 4 * self.attention * columns
