from . import BLOCK


class Alone:
    """The needed blocks alone, nothing else: whether the base LM can tell what is asked at all."""

    def keep(self, asked, budget):
        kept = [n for block in asked.needed for n in range(block * BLOCK, min(asked.tokens, (block + 1) * BLOCK))]
        if len(kept) > budget:
            raise ValueError(f"--budget={budget}: the blocks that hold the needles take {len(kept)} tokens")
        return kept
