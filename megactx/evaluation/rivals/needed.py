from . import filled


class Needed:
    """The oracle: the blocks that hold needles, then the newest tokens."""

    def keep(self, asked, budget):
        return filled(asked, budget, asked.needed, 0)
