"""What a gist of gists does in the place of its K^2 tokens: the block loss a level up (method 4)."""

from .block import Block


class Level2(Block):
    """Spans of K^2 tokens, each replaced by the gist of its K gists. Arguments as of ``Block``."""

    needs = ("starts2",)
    main_vectors = True
    starts, level = "starts2", 2

    def __init__(self, weight: float = 0.0, objective: str = "kl", seam_weight: float = 1.0):
        super().__init__(weight, objective, seam_weight)
