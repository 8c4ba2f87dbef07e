"""An encoder that shows every mistake: its gist depends on each child, on their order, and on nothing it should not."""

import pytest
import torch
from whole_trees import K, ids

WIDTH = 4


class WeightedMean:
    """Children weighted by their place; with ``places`` also by the place in the batch, as a real kernel may."""

    width = WIDTH

    def __init__(self, block_size: int, places: bool = False, left_context: int = 0, factor: float = 1.0):
        self.block_size, self.places, self.left_context, self.factor = block_size, places, left_context, factor
        self._blocks = 0  # private: no setting, and so no part of what the encoder is

    def encode_block(self, children, seen=None):  # [E, K, D] -> [E, D]
        self._blocks += len(children)
        weights = torch.linspace(0.5, 1.5, self.block_size)[:, None]
        gists = (children * weights).mean(1) * self.factor
        if seen is not None:
            left = seen.states[:, : -self.block_size] * seen.mask[:, : -self.block_size, None]
            gists = gists + left.sum(1) * 0.25
        return gists + torch.arange(len(gists))[:, None] * 1e-3 * self.places

    @property
    def blocks(self) -> int:
        """How many were encoded, padding included."""
        return self._blocks

    def offset_in(self, tokens: int) -> int:
        return tokens // 2


@pytest.fixture
def encoder():
    return WeightedMean


@pytest.fixture(scope="session")
def table():
    """Embeddings of 50 ids."""
    torch.manual_seed(0)
    return torch.nn.Embedding(50, WIDTH).requires_grad_(False)


@pytest.fixture
def tree(encoder, table):
    """Two rows of unlike length, of two merged parts, with gists that are protected and that were read."""
    from megactx.memory import MegaContextTree

    tree = MegaContextTree.from_tokens(ids(2, 300), encoder(K), table, torch.tensor([300, 120]), name="first")
    tree.merge(MegaContextTree.from_tokens(ids(2, 60, seed=1), encoder(K), table, name="second"))
    tree.protect(1, torch.tensor([[3], [4]]))
    tree.gather(1, torch.tensor([[1, 2], [3, 4]]))
    return tree
