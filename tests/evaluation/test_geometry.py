import math

import pytest
import torch
import torch.nn.functional as F

from megactx.evaluation.geometry import (
    GistGeometry,
    adjacent_distance,
    attention_entropy,
    contrastive_gap,
    gist_diversity,
    pairwise_cosines,
)


def gists(count=60, width=8, shift=0.5):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1)) + shift


def test_diversity_is_one_minus_the_mean_cosine_of_all_pairs():
    x = gists()
    pairs = [F.cosine_similarity(x[i], x[j], dim=0).item() for i in range(len(x)) for j in range(i)]
    assert gist_diversity(x).item() == pytest.approx(1 - sum(pairs) / len(pairs), abs=1e-6)
    assert gist_diversity(torch.ones(5, 4)).item() == pytest.approx(0)


def test_at_most_a_thousand_gists_are_compared_and_the_choice_is_seeded():
    x = gists(count=1100)
    assert len(pairwise_cosines(x)) == 1000 * 999 // 2
    assert torch.equal(pairwise_cosines(x, seed=3), pairwise_cosines(x, seed=3))


def test_metric_equals_the_pairwise_figures_however_the_gists_are_split_over_processes():
    x = gists()
    left, right = x[:-1], x[1:]
    one, two = GistGeometry(8), GistGeometry(8)
    one.update(x[:7], left[:7], right[:7])
    two.update(x[7:], left[7:], right[7:])
    one.merge_state(two)
    got = one.compute()
    assert got["diversity"].item() == pytest.approx(gist_diversity(x).item())
    assert got["cosine_std"].item() == pytest.approx(pairwise_cosines(x).std(correction=0).item())
    assert got["adjacent_distance"].item() == pytest.approx(adjacent_distance(left, right).item())
    assert got["contrastive_gap"].item() == pytest.approx(contrastive_gap(x, left, right).item())


def test_geometry_of_a_single_gist_is_undefined():
    metric = GistGeometry(8)
    metric.update(gists(count=1))
    assert all(value.isnan() for value in metric.compute().values())


def test_attention_entropy_is_in_bits():
    assert attention_entropy(torch.full((2, 3, 32), 1 / 32)).item() == pytest.approx(5)
    assert attention_entropy(F.one_hot(torch.tensor([3, 5]), 32).float()).item() == 0
    p = torch.tensor([0.9, 0.1])
    assert attention_entropy(p).item() == pytest.approx(-0.9 * math.log2(0.9) - 0.1 * math.log2(0.1), rel=1e-6)
