"""One linear layer."""

from torch import Tensor, nn


class Linear(nn.Module):
    """One linear layer, I -> D."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.last = nn.Linear(inputs, width)

    def forward(self, pooled: Tensor) -> Tensor:  # [B, I] -> [B, D]
        return self.last(pooled)
