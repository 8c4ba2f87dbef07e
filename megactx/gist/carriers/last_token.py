"""The block's last token as it is, at its own position."""

from torch import Tensor

from megactx.gist.carrier import Compressor, SoftTokens
from megactx.lm import BaseLM
from megactx.lm.prefill import Prefill


class LastToken(Compressor):
    """The block's last token as it is, one entry for one entry: the bar that a gist must clear (method 5).

    Setting: ``stage.evaluate.controls``.
    """

    def __init__(self, block_size: int = 32):
        super().__init__(block_size, "end")

    def compress(self, base: BaseLM, prefill: Prefill, starts: Tensor) -> SoftTokens:
        return SoftTokens(base.embed(prefill.ids.gather(1, starts + self.offset)), self.offset)
