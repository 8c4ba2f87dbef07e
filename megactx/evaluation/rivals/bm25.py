from . import BLOCK, filled


class Bm25:
    """Raw blocks that BM25 finds for the question; a quarter of the budget is the newest tokens."""

    def keep(self, asked, budget):
        try:
            import bm25s
        except ImportError as error:
            raise ValueError("--policies=bm25 needs the package bm25s: pip install megactx[rivals]") from error
        index = bm25s.BM25()
        index.index(bm25s.tokenize(asked.blocks, show_progress=False), show_progress=False)
        question = bm25s.tokenize([asked.question], show_progress=False)
        count = min(len(asked.blocks), budget // BLOCK)
        found, _ = index.retrieve(question, k=count, show_progress=False)
        return filled(asked, budget, [int(block) for block in found[0]], budget // 4)
