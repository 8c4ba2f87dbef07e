"""Controls that always stand beside a trained gist (SPEC 5): one vector per block, nothing trained.

Each takes the embeddings of blocks [B, N, K, D] and returns vectors [B, N, D].
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def last_token(embeddings: Tensor) -> Tensor:
    """The block's last token as it is; it sits at its own position, start + K - 1."""
    return embeddings[:, :, -1]


def mean_raw(embeddings: Tensor) -> Tensor:
    """The mean token embedding."""
    return embeddings.mean(dim=2)


def mean_rescaled(embeddings: Tensor, rms: float) -> Tensor:
    """The mean token embedding at the root mean square of token embeddings."""
    return F.rms_norm(embeddings.float().mean(dim=2), embeddings.shape[-1:]) * rms


def random_gist(embeddings: Tensor, rms: float, seed: int) -> Tensor:
    """Gaussian noise at the root mean square of token embeddings."""
    generator = torch.Generator().manual_seed(seed)
    b, n, _, d = embeddings.shape
    return torch.randn(b, n, d, generator=generator).to(embeddings.device) * rms
