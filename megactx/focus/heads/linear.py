"""Nothing but the last linear layer."""

from torch import nn


class Linear(nn.Identity):
    """D -> D, as it is."""

    def __init__(self, width: int):
        super().__init__()
        self.outputs = width
