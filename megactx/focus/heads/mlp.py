"""Linear, GELU."""

from torch import nn


class Mlp(nn.Sequential):
    """One linear layer with a GELU, D -> max(D / 2, 128)."""

    def __init__(self, width: int):
        outputs = max(width // 2, 128)
        super().__init__(nn.Linear(width, outputs), nn.GELU())
        self.outputs = outputs
