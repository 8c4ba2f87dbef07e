import math

import pytest
import torch
import torch.nn.functional as F

from megactx.evaluation.geometry import (
    AttentionEntropy,
    GistGeometry,
    attention_entropy,
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
    domain = ["code" if i % 3 else "narrative" for i in range(len(x))]
    paired = torch.arange(len(x)) % 4 > 0
    right = x.roll(-1, 0)
    one, two = GistGeometry(8), GistGeometry(8)
    for metric, rows in ((one, slice(0, 7)), (one, slice(7, 40)), (two, slice(40, None))):
        metric.update(x[rows], domain[rows], paired[rows], right[rows][paired[rows]])
    one.merge_state(two)
    got = one.compute()
    code = torch.tensor([name == "code" for name in domain])
    for prefix, rows in (("", torch.ones(len(x), dtype=torch.bool)), ("code/", code), ("narrative/", ~code)):
        left, neighbour = x[rows & paired], right[rows & paired]
        assert got[f"{prefix}diversity"].item() == pytest.approx(gist_diversity(x[rows]).item(), rel=1e-9)
        distance = (1 - F.cosine_similarity(left.double(), neighbour.double())).mean().item()
        assert got[f"{prefix}adjacent_distance"].item() == pytest.approx(distance)
        assert got[f"{prefix}contrastive_gap"].item() == pytest.approx(gist_diversity(x[rows]).item() - distance)
    assert got["cosine_std"].item() == pytest.approx(pairwise_cosines(x).std(correction=0).item())
    assert not any(name.startswith("structured/") for name in got)


def test_geometry_of_a_single_gist_is_undefined():
    metric = GistGeometry(8)
    metric.update(gists(count=1), ["code"], torch.tensor([False]), torch.empty(0, 8))
    assert all(value.isnan() for value in metric.compute().values())


def test_a_batch_without_neighbours_leaves_the_adjacent_distance_undefined_and_the_rest_defined():
    metric = GistGeometry(8)
    metric.update(gists(count=5), ["code"] * 5, torch.zeros(5, dtype=torch.bool), torch.empty(0, 8))
    got = metric.compute()
    assert got["adjacent_distance"].isnan() and got["contrastive_gap"].isnan()
    assert got["diversity"].isfinite() and got["code/diversity"].isfinite()


def test_attention_entropy_is_in_bits():
    torch.testing.assert_close(attention_entropy(torch.full((2, 3, 32), 1 / 32)), torch.full((2, 3), 5.0).double())
    assert attention_entropy(F.one_hot(torch.tensor([3, 5]), 32).float()).tolist() == [0, 0]
    p = torch.tensor([0.9, 0.1])
    assert attention_entropy(p).item() == pytest.approx(-0.9 * math.log2(0.9) - 0.1 * math.log2(0.1), rel=1e-6)


def test_attention_entropy_is_the_mean_over_heads_and_rows_then_blocks_overall_and_per_domain():
    weights = torch.randn(7, 4, 3, 8, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    domain = ["code", "code", "narrative", "code", "narrative", "code", "code"]
    metric = AttentionEntropy()
    metric.update(weights[:3], domain[:3])
    metric.update(weights[3:], domain[3:])

    def plain(blocks):
        rows = [row.tolist() for b in blocks for row in weights[b].flatten(0, 1)]
        return sum(-sum(p * math.log2(p) for p in row) for row in rows) / len(rows)

    got = metric.compute()
    assert got["attention_entropy"].item() == pytest.approx(plain(range(7)), rel=1e-6)
    assert got["narrative/attention_entropy"].item() == pytest.approx(plain([2, 4]), rel=1e-6)


def test_attention_entropy_of_a_net_that_attends_nowhere_is_undefined():
    metric = AttentionEntropy()
    metric.update(None, ["code"])
    assert list(metric.compute()) == ["attention_entropy"] and metric.compute()["attention_entropy"].isnan()
