from . import BLOCK, SINK, filled


class Needed:
    """The oracle: the blocks that hold needles, then the newest tokens."""

    def keep(self, asked, budget):
        if (wanted := SINK + BLOCK * len(asked.needed)) > budget:
            raise ValueError(f"--budget={budget}: the blocks that hold the needles take {wanted} tokens with the sink")
        return filled(asked, budget, asked.needed, 0)
