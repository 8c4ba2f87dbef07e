from megactx.evaluation.policies.bm25 import okapi

from . import few


class Bm25Few:
    """As ``bm25``, but only as many blocks as a session opens for a question, with their neighbours, and few of the
    newest tokens, as a session does with ``--newest``."""

    def keep(self, asked, budget):
        return few(asked, budget, okapi(asked.blocks, asked.question).argsort(descending=True, stable=True).tolist())
