from . import few
from .dense import Dense


class DenseFew(Dense):
    """As ``dense``, but only two blocks, with their neighbours, and few of the newest tokens: a window as small as that
    of a session with ``--newest``."""

    def keep(self, asked, budget):
        return few(asked, budget, self.order(asked))
