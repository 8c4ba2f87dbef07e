from megactx.evaluation.policies.bm25 import okapi

from . import filled, near


class Bm25Near:
    """As ``bm25``, but each block that is found brings its neighbours."""

    def keep(self, asked, budget):
        order = okapi(asked.blocks, asked.question).argsort(descending=True, stable=True).tolist()
        return filled(asked, budget, near(order[:budget], len(asked.blocks)), budget // 4)
