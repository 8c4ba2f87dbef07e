"""Trees that two kinds of files must bring back, and what it means that they do."""

import torch

K = 4


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


def everything(tree) -> list[torch.Tensor]:
    columns = [(level, column) for level in tree.levels for column in level.columns]
    return [tree.lengths, *[level.whole(column) for level, column in columns], *[first for _, first in tree.parts]]


def assert_same(one, other):
    assert [name for name, _ in one.parts] == [name for name, _ in other.parts] and one.max_level == other.max_level
    assert len(everything(one)) == len(everything(other))
    for a, b in zip(everything(one), everything(other), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
