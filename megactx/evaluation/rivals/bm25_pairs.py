from megactx.evaluation.policies.bm25 import okapi

from . import filled


class Bm25Pairs:
    """BM25 over each two blocks that follow each other: a fact that crosses a border is in one of them whole.

    None of the budget is for the newest tokens: where a text is a collection of facts, they are as any others.
    """

    def keep(self, asked, budget):
        pairs = [f"{one}{other}" for one, other in zip(asked.blocks, [*asked.blocks[1:], ""], strict=True)]
        order = okapi(pairs, asked.question).argsort(descending=True, stable=True).tolist()
        chosen = [block for n in order[:budget] for block in (n, n + 1) if block < len(asked.blocks)]
        return filled(asked, budget, chosen, 0)
