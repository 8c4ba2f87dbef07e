"""Mean over the block."""

from torch import Tensor, nn


class Mean(nn.Module):
    """The mean of the K states. No parameters."""

    needs_cls = False

    def __init__(self, width: int):
        super().__init__()

    def forward(self, states: Tensor) -> Tensor:  # [B, K, D] -> [B, D]
        return states.mean(dim=1)
