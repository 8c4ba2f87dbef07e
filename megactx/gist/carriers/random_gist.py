"""Noise in place of a gist: what a vector is worth that knows nothing."""

import torch
from torch import Tensor

from megactx.gist.carrier import Compressor, SoftTokens
from megactx.lm import BaseLM
from megactx.lm.prefill import Prefill


class RandomGist(Compressor):
    """Gaussian noise at the root mean square of token embeddings, the same for a document whatever its batch.

    Setting: ``stage.evaluate.controls``.

    Args:
        rms: root mean square of the base LM's token embeddings.
        seed: of the noise.
    """

    def __init__(self, rms: float, block_size: int = 32, position: str = "centre", seed: int = 0):
        super().__init__(block_size, position)
        self.rms, self.seed = rms, seed

    def compress(self, base: BaseLM, prefill: Prefill, starts: Tensor) -> SoftTokens:
        noise = torch.empty(*starts.shape, base.width)  # [B, N, D]
        for row, first in zip(noise, prefill.ids[:, : self.block_size + 1].sum(1).tolist(), strict=True):
            row.normal_(generator=torch.Generator().manual_seed(self.seed + first))
        return SoftTokens(noise.to(starts.device) * self.rms, self.offset)
