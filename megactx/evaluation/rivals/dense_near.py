from . import filled, near
from .dense import Dense


class DenseNear(Dense):
    """As ``dense``, but each block that is found brings its neighbours."""

    def keep(self, asked, budget):
        return filled(asked, budget, near(self.order(asked)[:budget], len(asked.blocks)), budget // 4)
