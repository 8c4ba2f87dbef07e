from . import few


class NeededFew:
    """The oracle of a small window: the blocks that hold needles with their neighbours, and few of the newest tokens.
    A session with ``--newest`` reads as much where its search is right."""

    def keep(self, asked, budget):
        return few(asked, budget, asked.needed, len(asked.needed))
