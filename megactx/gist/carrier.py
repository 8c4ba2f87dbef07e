"""What stands for a block, and what makes it.

    SoftTokens  one embedding per block. The base LM reads it as it reads a token, and it has an output row.
    KVSlots     keys and values of one column per block at every layer. The base LM only attends to them: no output row.

B documents, N blocks, K tokens of a block, D width, L layers, G key-value heads, W head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megactx.lm import BaseLM
from megactx.lm.prefill import Prefill, prefill, unread

POSITIONS = ("centre", "end")
BYTES = 2  # of a stored number: 16 bit


@dataclass(frozen=True)
class SoftTokens:
    """One vector per block, at ``start + offset``, or several. The output of the last predicts the token behind it."""

    vectors: Tensor  # [B, N, D], or [B, N, M, D]: M of them
    offset: int | Sequence[int]  # of each of the M
    sigma: Tensor | None = None  # standard deviation of that position in tokens, a scalar; None: it is a point
    first = 0  # the first offset of the horizon that has a score

    def bytes_per_block(self) -> int:
        return BYTES * self.vectors.shape[2:].numel()

    def in_a_row(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """All vectors of blocks at starts [B, N], one behind the other: vectors [B, N M, D], positions [B, N M]."""
        vectors = self.vectors if self.vectors.ndim == 4 else self.vectors[:, :, None]
        offsets = torch.as_tensor(self.offset, device=starts.device).view(-1)
        return vectors.flatten(1, 2), (starts[..., None] + offsets).flatten(1)

    @property
    def slots(self) -> int:
        """M."""
        return 1 if self.vectors.ndim == 3 else self.vectors.shape[2]


@dataclass(frozen=True)
class KVSlots:
    """Keys (rotated already) and values of one column per block. They have no output row, so h = 0 has no score."""

    layers: Sequence[tuple[Tensor, Tensor]]  # per layer, each [B, G, N, W]
    slots = 1  # columns of a block
    first = 1  # the first offset of the horizon that has a score

    def bytes_per_block(self) -> int:
        return sum(BYTES * part.shape[1] * part.shape[3] for layer in self.layers for part in layer)


class Compressor(nn.Module):
    """Compresses blocks of documents that the base LM has read.

    Args:
        block_size: K.
        position: ``centre`` (start + K // 2) or ``end`` (start + K - 1): where the carrier sits in the base LM.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    setting = "compressor"  # where a user sets it
    needs_hidden = False  # reads the base LM's own states of the block
    makes_vectors = True  # ``SoftTokens``; else ``KVSlots``
    slots = 1  # M, vectors of a block
    makes_levels = False  # ``compress`` takes a ``lod``, and makes gists of gists too

    def __init__(self, block_size: int = 32, position: str = "centre"):
        super().__init__()
        if block_size < 1:
            raise ValueError(f"block_size={block_size} is not allowed: at least 1")
        if position not in POSITIONS:
            allowed = ", ".join(POSITIONS)
            raise ValueError(f"{self.setting}.position={position} is not known, allowed are {allowed}")
        self.block_size, self.position = block_size, position

    @property
    def makes_one_vector(self) -> bool:
        """Whether a block is a point of the base LM's input space: what has a distance, a level above, a tree."""
        return self.makes_vectors and self.slots == 1

    @property
    def levels(self) -> int:
        """Sets of weights: 1, or one for each LOD of gists."""
        return 1

    @property
    def offset(self) -> int:
        """Position of a carrier relative to its block's start."""
        return self.offset_in(self.block_size)

    def offset_in(self, tokens: int) -> int:
        """Position of a carrier relative to the start of the span that it stands for, K tokens or K^n."""
        return tokens // 2 if self.position == "centre" else tokens - 1

    def sigma(self, lod: int) -> Tensor | None:
        """Standard deviation of a carrier's position in tokens, a scalar; ``None``: it is a point."""
        return None

    def compress(self, base: BaseLM, prefill: Prefill, starts: Tensor) -> SoftTokens | KVSlots:
        """Carriers of the blocks at starts [B, N]. ``prefill`` is what the base LM made of their documents."""
        raise NotImplementedError

    def compress_level(self, base: BaseLM, prefill: Prefill, starts: Tensor, lod: int) -> SoftTokens | KVSlots:
        """``compress``, where a carrier stands for a span of K^level tokens.

        Raises:
            ValueError: a level above 1 of what makes no gists of gists.
        """
        if lod == 1:
            return self.compress(base, prefill, starts)
        if not self.makes_levels:
            raise ValueError(f"{type(self).__name__} makes no gists of gists: level={lod} is not allowed, only 1")
        return self.compress(base, prefill, starts, lod)

    @torch.no_grad()
    def flops_per_block(self, base: BaseLM) -> int:
        """Measured floating-point operations for one block that ``base`` has read (``torch.utils.flop_counter``)."""
        from torch.utils.flop_counter import FlopCounterMode

        ids = torch.zeros(1, self.block_size, dtype=torch.long, device=next(self.parameters()).device)
        reads = self.needs_hidden or not self.makes_vectors
        read = prefill(base, ids, with_states=True) if reads else unread(ids)
        with FlopCounterMode(display=False) as counter:
            self.compress(base, read, torch.zeros_like(ids[:, :1]))
        return counter.get_total_flops()


def windows(states: Tensor, starts: Tensor, block: int) -> Tensor:
    """States of blocks: [B, T, D], starts [B, N] -> [B, N, K, D]."""
    index = (starts[..., None] + torch.arange(block, device=starts.device)).flatten(1)
    taken = states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
    return taken.view(*starts.shape, block, states.shape[-1])
