"""A learned vector, prepended once, read after the backbone."""

from torch import Tensor, nn


class Cls(nn.Module):
    """The state of the CLS vector (Devlin et al. 2019, arXiv 1810.04805).

    It only carries the block because the backbone's attention is not causal: a leading CLS under a causal mask would
    see nothing and be the same for every block.
    """

    needs_cls = True

    def __init__(self, width: int):
        super().__init__()

    def forward(self, states: Tensor) -> Tensor:  # [B, 1 + K, D] -> [B, D]
        return states[:, 0]

    def attention(self, states: Tensor, last: Tensor) -> Tensor:  # the CLS row: [B, A, 1, 1 + K]
        return last[:, :, :1]
