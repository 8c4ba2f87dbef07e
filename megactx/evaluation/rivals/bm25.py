from megactx.evaluation.policies.bm25 import okapi

from . import filled


class Bm25:
    """Raw blocks that BM25 finds for the question; a quarter of the budget is the newest tokens."""

    def keep(self, asked, budget):
        order = okapi(asked.blocks, asked.question).argsort(descending=True, stable=True).tolist()
        return filled(asked, budget, order, budget // 4)
