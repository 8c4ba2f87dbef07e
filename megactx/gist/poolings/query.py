"""One learned query attends once."""

import torch
from torch import Tensor, nn


class Query(nn.Module):
    """Scaled dot-product attention of one learned query over the states (Lin et al. 2017, arXiv 1703.03130)."""

    needs_cls = False

    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(width) * width**-0.5)

    def weights(self, states: Tensor) -> Tensor:  # [B, K, D] -> [B, K], sums to 1
        return torch.softmax((states @ self.query.to(states.dtype)).float() * states.shape[-1] ** -0.5, dim=-1)

    def forward(self, states: Tensor) -> Tensor:  # [B, K, D] -> [B, D]
        return (self.weights(states).to(states.dtype)[:, None] @ states)[:, 0]

    def attention(self, states: Tensor, last: Tensor) -> Tensor:  # its own: [B, 1, 1, K]
        return self.weights(states)[:, None, None]
