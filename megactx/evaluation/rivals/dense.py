from megactx.lm.sentences import SentenceEncoder

from . import filled


class Dense:
    """Raw blocks whose embedding by all-MiniLM-L6-v2 is most like the question's; a quarter is the newest tokens.

    Raises:
        ValueError: the package with the weights is not installed.
    """

    def __init__(self):
        self.encoder = SentenceEncoder("--policies=dense").ready()

    def order(self, asked) -> list[int]:
        """Blocks, the most alike first."""
        likeness = self.encoder.embed(asked.blocks) @ self.encoder.embed([asked.question])[0]
        return likeness.argsort(descending=True, stable=True).tolist()

    def keep(self, asked, budget):
        return filled(asked, budget, self.order(asked), budget // 4)
