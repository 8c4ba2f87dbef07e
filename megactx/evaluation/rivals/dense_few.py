from . import few
from .dense import Dense


class DenseFew(Dense):
    """As ``dense``, but only as many blocks as a session opens for a question, with their neighbours, and few of the
    newest tokens, as a session does with ``--newest``."""

    def keep(self, asked, budget):
        return few(asked, budget, self.order(asked))
