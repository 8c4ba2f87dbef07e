"""How gists lie in their space: diversity, distance of neighbours, and how sharply a GistNet attends (method 5).

Cosine distance is 1 - cosine. N gists, D width.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.data.files import ALL_DOMAINS

from .sums import DomainSums

LIMIT = 1000  # gists whose pairs are compared


def pairwise_cosines(gists: Tensor, seed: int = 0) -> Tensor:
    """Gists [N, D] -> cosines of all pairs of up to 1,000 of them, drawn at random, [pairs]."""
    if len(gists) > LIMIT:
        pick = torch.randperm(len(gists), generator=torch.Generator().manual_seed(seed))[:LIMIT]
        gists = gists[pick.to(gists.device)]
    unit = F.normalize(gists.double(), dim=-1)
    left, right = torch.triu_indices(len(unit), len(unit), offset=1, device=unit.device)
    return (unit @ unit.T)[left, right]


def gist_diversity(gists: Tensor, seed: int = 0) -> Tensor:
    """1 - mean cosine of random pairs; above 0.5 is healthy, below 0.3 is collapse."""
    return 1 - pairwise_cosines(gists, seed).mean()


def attention_entropy(weights: Tensor) -> Tensor:
    """Attention weights [..., K] that sum to 1 -> entropy in bits [...]; log2(K) is flat, 0 is one token."""
    weights = weights.double()
    return -torch.special.xlogy(weights, weights).sum(-1) / torch.log(torch.tensor(2.0, dtype=torch.float64))


class GistGeometry(DomainSums):
    """Diversity, spread and neighbour distance of all gists, over all batches and processes.

    Needs no sample of pairs: with unit vectors u_i the mean cosine of all pairs follows from sum u_i, and its second
    moment from the Gram matrix sum u_i u_i^T, and both are sums.

    Args:
        width: D.
        domains: every domain that can occur.

    ``compute`` returns ``diversity``, ``adjacent_distance`` and ``contrastive_gap``, overall and per domain, and
    ``cosine_std`` (std of pairwise cosine), overall only: its matrix is D x D. NaN with fewer than two gists.
    """

    def __init__(self, width: int, domains: Iterable[str] = ALL_DOMAINS, **kwargs):
        super().__init__({"total": (width,), "adjacent": (), "neighbours": ()}, domains, **kwargs)
        self.add_state("gram", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, gists: Tensor, domain: Sequence[str], paired: Tensor, right: Tensor) -> None:
        """Gists [M, D] and the domains of their blocks; bool [M], who has a right neighbour; its gist, [pairs, D]."""
        unit = F.normalize(gists.double(), dim=-1)
        distance = unit.new_zeros(len(unit))
        distance[paired] = 1 - F.cosine_similarity(gists[paired].double(), right.double(), dim=-1)
        self.add(domain, total=unit, adjacent=distance, neighbours=paired)
        self.gram = self.gram + unit.T @ unit

    def figures(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        diversity = 1 - self._mean_cosine(sums)
        adjacent = sums["adjacent"] / sums["neighbours"]
        return {"diversity": diversity, "adjacent_distance": adjacent, "contrastive_gap": diversity - adjacent}

    def compute(self) -> dict[str, Tensor]:
        everything = {name: getattr(self, name).sum(0) for name in ("blocks", "total")}
        mean = self._mean_cosine(everything)
        square = (self.gram.square().sum() - everything["blocks"]) / _pairs(everything["blocks"])
        return super().compute() | {"cosine_std": (square - mean.square()).clamp(min=0).sqrt()}

    @staticmethod
    def _mean_cosine(sums: dict[str, Tensor]) -> Tensor:
        return (sums["total"].square().sum() - sums["blocks"]) / _pairs(sums["blocks"])


class AttentionEntropy(DomainSums):
    """Entropy of the attention by which a GistNet reads its blocks, in bits: mean over heads and rows, then blocks.

    ``compute`` returns ``attention_entropy``, overall and per domain; 2.0-4.0 is healthy. NaN where the net attends
    nowhere.
    """

    def __init__(self, domains: Iterable[str] = ALL_DOMAINS, **kwargs):
        super().__init__({"entropy": ()}, domains, **kwargs)

    def update(self, weights: Tensor | None, domain: Sequence[str]) -> None:
        """What ``GistNet.attention`` gives, [M, A, Q, K] or nothing, and the domains of the M blocks."""
        if weights is not None:
            self.add(domain, entropy=attention_entropy(weights).flatten(1).mean(1))

    def figures(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"attention_entropy": sums["entropy"] / sums["blocks"]}


def _pairs(blocks: Tensor) -> Tensor:
    """Ordered pairs of so many gists; NaN where there is none."""
    return torch.where(blocks > 1, blocks * (blocks - 1), torch.nan)
