"""How gists lie in their space: diversity, distance of neighbours, and how sharply a GistNet attends (SPEC 5).

Cosine distance is 1 - cosine. N gists, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

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


def adjacent_distance(left: Tensor, right: Tensor) -> Tensor:
    """Mean cosine distance of neighbours: gists [N, D] of blocks and of the blocks right of them."""
    return (1 - F.cosine_similarity(left.double(), right.double(), dim=-1)).mean()


def contrastive_gap(gists: Tensor, left: Tensor, right: Tensor, seed: int = 0) -> Tensor:
    """Cosine distance of random pairs minus that of neighbours; above 0.1 says that gists follow the text."""
    return gist_diversity(gists, seed) - adjacent_distance(left, right)


def attention_entropy(weights: Tensor) -> Tensor:
    """Attention weights [..., K] that sum to 1 -> mean entropy in bits; log2(K) is flat, 0 is one token."""
    weights = weights.double()
    return -torch.special.xlogy(weights, weights).sum(-1).mean() / torch.log(torch.tensor(2.0))


class GistGeometry(Metric):
    """Diversity, spread and neighbour distance of all gists, over all batches and processes.

    Needs no sample of pairs: with unit vectors u_i the mean cosine of all pairs follows from sum u_i, and its second
    moment from the Gram matrix sum u_i u_i^T, and both are sums.

    Args:
        width: D.

    ``compute`` returns ``diversity``, ``cosine_std`` (std of pairwise cosine), ``adjacent_distance`` and
    ``contrastive_gap``; NaN with fewer than two gists.
    """

    full_state_update = False
    higher_is_better = None

    def __init__(self, width: int, **kwargs):
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("gram", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("adjacent", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("neighbours", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, gists: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> None:
        """Gists [N, D]; pairs of neighbours left, right [P, D]."""
        unit = F.normalize(gists.double(), dim=-1)
        self.total += unit.sum(0)
        self.gram += unit.T @ unit
        self.count += len(unit)
        if left is not None:
            self.adjacent += adjacent_distance(left, right) * len(left) if len(left) else 0.0
            self.neighbours += len(left)

    def compute(self) -> dict[str, Tensor]:
        pairs = torch.where(self.count > 1, self.count * (self.count - 1), torch.nan)
        mean = (self.total.square().sum() - self.count) / pairs
        square = (self.gram.square().sum() - self.count) / pairs
        adjacent = self.adjacent / self.neighbours
        return {
            "diversity": 1 - mean,
            "cosine_std": (square - mean.square()).clamp(min=0).sqrt(),
            "adjacent_distance": adjacent,
            "contrastive_gap": 1 - mean - adjacent,
        }
