from . import BLOCK


class Alone:
    """The needed blocks alone, nothing else, whatever the budget: whether the base LM can tell what is asked at all."""

    def keep(self, asked, budget):
        return [n for block in asked.needed for n in range(block * BLOCK, min(asked.tokens, (block + 1) * BLOCK))]
