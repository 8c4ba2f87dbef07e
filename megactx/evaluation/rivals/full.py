class Full:
    """All of it, whatever the budget."""

    def keep(self, asked, budget):
        return [*range(asked.tokens)]
