"""GistPool: Gisting with all three fixes of arXiv 2504.08934."""

from megactx.lm import BaseLM

from .gisting import Gisting


class GistPool(Gisting):
    """Learned pooling: shifted activations, parameters of its own, each gist over its own window (arXiv 2504.08934).

    With its states forced to the mean of the window it is ``AvgPool``.
    """

    def __init__(self, base: BaseLM, block_size: int = 32, position: str = "centre", rank: int = 16):
        super().__init__(base, block_size, position, shift=True, rank=rank, window=True)
