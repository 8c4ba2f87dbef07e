"""The mean token embedding of the block, nothing trained."""

import torch.nn.functional as F
from torch import Tensor

from megactx.gist.carrier import Compressor, SoftTokens, windows
from megactx.lm import BaseLM
from megactx.lm.prefill import Prefill


class MeanToken(Compressor):
    """The mean of token embeddings as it is, or rescaled to their root mean square.

    Pooling by a mean is a strong compressor where it is trained (Feldman & Artzi 2025, arXiv 2510.20797).
    Setting: ``stage.evaluate.controls``.

    Args:
        rms: the root mean square to rescale to; ``None`` leaves the mean as it is.
    """

    def __init__(self, block_size: int = 32, position: str = "centre", rms: float | None = None):
        super().__init__(block_size, position)
        self.rms = rms

    def compress(self, base: BaseLM, prefill: Prefill, starts: Tensor) -> SoftTokens:
        mean = windows(base.embed(prefill.ids), starts, self.block_size).float().mean(dim=2)
        if self.rms is not None:
            mean = F.rms_norm(mean, mean.shape[-1:]) * self.rms
        return SoftTokens(mean, self.offset)
