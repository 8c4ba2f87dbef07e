"""What a gist of gists does in the place of its K^2 tokens: the block loss a level up (method 4)."""

from typing import Literal

from megactx.framework.config.types import NonNegative, Share, declared
from megactx.gist.carrier import Compressor
from megactx.lm.chunked_head import OBJECTIVES

from .block import Block


@declared("loss.level2")
class Level2(Block):
    """KL from the full context behind spans of K^2 tokens, each replaced by the gist of its K gists.

    Arguments as of ``Block``.
    """

    needs = ("span_starts",)
    starts, lod = "span_starts", 2

    def __init__(self, weight: NonNegative = 0.0, objective: Literal[OBJECTIVES] = "kl", seam_weight: Share = 1.0):
        super().__init__(weight, objective, seam_weight)

    def check(self, nets: dict[str, Compressor]) -> None:
        for name, net in nets.items():
            if self.weight and not net.makes_levels:
                raise ValueError(
                    f"loss.level2.weight={self.weight} is not allowed with {name}, which makes no gists of gists: 0"
                )
