"""Documents made from real ones: a share of the training documents, and held-out ones of each label."""

import math

import numpy as np

from .adversarial import KINDS, Vocabulary, disturbed
from .documents import IdsOf
from .files import ADVERSARIAL, MIXED
from .interleave import interleaved

HELD_OUT = 31  # seeds what is made from held-out documents: the same in every run, whatever its seed


class Composed:
    """Makes ``mixed`` and ``adversarial`` documents from the documents of one side of the split.

    Args:
        documents: as ``documents.cut`` returns them, each of at least two blocks.
        weights: domain -> share of the segments of mixed documents; domains without documents are left out.
        interleave, adversarial: shares of the documents that are made, each 0..1, together at most 1.
        block: tokens K of a block.
        vocabulary: of the tokenizer; needed where ``adversarial`` is above 0.

    A made document has the length of the one that it is made from, and its ``source`` and ``text``; a mixed one opens
    with it.
    """

    def __init__(
        self, documents, weights, interleave: float, adversarial: float, block: int, vocabulary: Vocabulary | None
    ):
        self.interleave, self.adversarial, self.block, self.vocabulary = interleave, adversarial, block, vocabulary
        pools = {domain: IdsOf([d for d in documents if d["domain"] == domain]) for domain in weights}
        self.pools = [pool for pool in pools.values() if pool]
        shares = np.asarray([weights[domain] for domain, pool in pools.items() if pool])
        self.shares = shares / shares.sum()

    def __call__(self, document: dict, rng: np.random.Generator) -> dict:
        """The document as it is, mixed, or adversarial, by the shares."""
        kind = rng.random()
        if kind < self.interleave:
            return self.mixed(document, rng)
        return self.disturbed(document, rng) if kind < self.interleave + self.adversarial else document

    def mixed(self, document: dict, rng) -> dict:
        ids = interleaved(document["input_ids"], rng, self.block, self._pick)
        return {**document, "input_ids": ids, "domain": MIXED}

    def disturbed(self, document: dict, rng, first: int | None = None) -> dict:
        ids = disturbed(document["input_ids"], rng, self.block, self.vocabulary, first)
        return {**document, "input_ids": ids, "domain": ADVERSARIAL}

    def held_out(self, documents: list[dict]) -> list[dict]:
        """Made documents of each label with a share above 0, as many as a domain has on average, at least two.

        Args:
            documents: the held-out documents, in the order in which they are to be used.
        """
        count = max(2, math.ceil(len(documents) / len(self.pools)))
        made = []
        for index, document in enumerate(documents[:count]):
            if self.interleave:
                made.append(self.mixed(document, np.random.default_rng([HELD_OUT, 0, index])))
            if self.adversarial:
                # All kinds in every four documents, in an order that does not follow that of the domains.
                kinds = np.random.default_rng([HELD_OUT, 1, index // len(KINDS)]).permutation(len(KINDS))
                rng = np.random.default_rng([HELD_OUT, 2, index])
                made.append(self.disturbed(document, rng, int(kinds[index % len(KINDS)])))
        return made

    def _pick(self, rng) -> np.ndarray:
        pool = self.pools[rng.choice(len(self.pools), p=self.shares)]
        return pool[rng.integers(len(pool))]
