"""Linear, ReLU, linear."""

from torch import Tensor, nn


class Mlp(nn.Module):
    """Two linear layers with a ReLU between, I -> 4 D -> D."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.first = nn.Linear(inputs, 4 * width)
        self.last = nn.Linear(4 * width, width)

    def forward(self, pooled: Tensor) -> Tensor:  # [B, I] -> [B, D]
        return self.last(self.first(pooled).relu())
