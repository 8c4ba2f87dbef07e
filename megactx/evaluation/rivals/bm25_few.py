from megactx.evaluation.policies.bm25 import okapi

from . import few


class Bm25Few:
    """As ``bm25``, but only two blocks, with their neighbours, and few of the newest tokens: a window as small as that
    of a session with ``--newest``."""

    def keep(self, asked, budget):
        return few(asked, budget, okapi(asked.blocks, asked.question).argsort(descending=True, stable=True).tolist())
