import math

import pytest
import torch
from block_scores import synthetic

from megactx.evaluation.metrics import GistMetrics, block_sums, dnll_by_offset, figures, recovery
from megactx.evaluation.scores import BlockScores


def some(scores, rows) -> BlockScores:
    """The given blocks of the scores."""
    flat = {
        "carriers": {name: values[rows] for name, values in scores.carriers.items()},
        "kl": {name: values[rows] for name, values in scores.kl.items()},
        "agree": {name: values[rows] for name, values in scores.agree.items()},
    }
    return BlockScores(
        scores.full[rows],
        scores.drop[rows],
        **flat,
        domain=[scores.domain[i] for i in rows],
        document=scores.document[rows],
        start=scores.start[rows],
    )


def plain(scores, carrier="gistnet"):
    """The definitions of method 5, block by block and offset by offset."""
    full, drop, gist = (x.double().tolist() for x in (scores.full, scores.drop, scores.carriers[carrier]))
    blocks, horizon = len(full), len(full[0])

    def ratio(offsets):
        gained = sum(gist[m][h] - full[m][h] for m in range(blocks) for h in offsets)
        return 1 - gained / sum(drop[m][h] - full[m][h] for m in range(blocks) for h in offsets)

    by_block = [sum(gist[m][h] - full[m][h] for h in range(horizon)) / horizon for m in range(blocks)]
    return {
        "dnll": sum(by_block) / blocks,
        "recovery": ratio(range(horizon)),
        "recovery_body": ratio(range(4, horizon)),
        "recovery_h0": ratio([0]),
        "recovery_h1_3": ratio([1, 2, 3]),
        "recovery_h4_15": ratio(range(4, 16)),
        "recovery_h16_up": ratio(range(16, horizon)),
        "substitutability": sum(value < 1.0 for value in by_block) / blocks,
        "ppl_ratio": math.exp(sum(by_block) / blocks),
        "kl": scores.kl[carrier].double().mean().item(),
        "top1": scores.agree[carrier].double().mean().item(),
    }


def test_every_figure_equals_its_plain_definition():
    scores = synthetic(cost=2.0)
    metrics = GistMetrics(32)
    metrics.update(scores)
    got = metrics.compute()
    for name, value in plain(scores).items():
        assert got[name].item() == pytest.approx(value, rel=1e-9), name
    assert 0 < got["substitutability"] < 1


def test_figures_of_a_domain_are_those_of_its_blocks_alone():
    scores = synthetic()
    metrics = GistMetrics(32)
    metrics.update(scores)
    code = [i for i, name in enumerate(scores.domain) if name == "code"]
    for name, value in plain(some(scores, code)).items():
        assert metrics.compute()[f"code/{name}"].item() == pytest.approx(value, rel=1e-9), name
    assert not any(name.startswith("structured") for name in metrics.compute())


def test_uneven_batches_and_merged_processes_give_the_same_ratio_of_sums():
    scores = synthetic(blocks=50, noise=0.4)
    whole, one, two = GistMetrics(32), GistMetrics(32), GistMetrics(32)
    whole.update(scores)
    one.update(some(scores, range(0, 3)))
    one.update(some(scores, range(3, 41)))
    two.update(some(scores, range(41, 50)))
    one.merge_state(two)
    for name, value in whole.compute().items():
        assert one.compute()[name].tolist() == pytest.approx(value.tolist(), rel=1e-12), name
    assert all(kind is torch.sum or kind.__name__ == "dim_zero_sum" for kind in whole._reductions.values())


def test_recovery_is_never_clipped():
    full = torch.zeros(4, 8)
    assert recovery(full, full + 1, full + 3) == pytest.approx(-2)
    assert recovery(full, full + 1, full - 1) == pytest.approx(2)


def test_recovery_is_undefined_where_dropping_costs_too_little():
    scores = synthetic(cost=0.002)
    metrics = GistMetrics(32)
    metrics.update(scores)
    got = metrics.compute()
    assert got["recovery"].isnan() and got["recovery_body"].isnan() and not got["dnll"].isnan()


def test_recovery_body_is_undefined_for_a_base_that_forgets_the_block_after_the_seam():
    full = torch.zeros(10, 32)
    drop = torch.full((10, 32), 0.5)
    drop[:, 4:16] = 0.005  # the rest of h >= 4 costs a lot, the near part nothing
    got = figures(block_sums(full, drop, drop / 2))
    assert got["recovery_body"].isnan() and got["recovery_h4_15"].isnan()
    assert got["recovery"].item() == pytest.approx(0.5) and got["recovery_h16_up"].item() == pytest.approx(0.5)


def test_bands_beyond_a_short_horizon_are_left_out():
    full = torch.zeros(3, 1)
    got = figures(block_sums(full, full + 1, full + 0.5))
    assert got["recovery"].item() == pytest.approx(0.5)
    assert "recovery_body" not in got and "recovery_h1_3" not in got


def test_dnll_by_offset_shows_the_seam():
    scores = synthetic()
    by_offset = dnll_by_offset(scores.full, scores.drop)
    assert by_offset.shape == (32,) and by_offset[0] > 3 * by_offset[1]
    assert by_offset[7].item() == pytest.approx((scores.drop[:, 7] - scores.full[:, 7]).mean().item(), rel=1e-5)


def test_dnll_by_offset_is_a_vector_of_the_metric_overall_and_per_domain():
    scores = synthetic()
    metrics = GistMetrics(32)
    metrics.update(scores)
    code = scores.rows("code")
    for prefix, rows in (("", slice(None)), ("code/", code)):
        full, got = scores.full[rows], metrics.compute()
        expected = dnll_by_offset(full, scores.carriers["gistnet"][rows])
        torch.testing.assert_close(got[f"{prefix}dnll_by_offset"], expected)
        torch.testing.assert_close(got[f"{prefix}dnll_drop_by_offset"], dnll_by_offset(full, scores.drop[rows]))
        assert got[f"{prefix}dnll_by_offset"].mean().item() == pytest.approx(got[f"{prefix}dnll"].item())


def test_an_unannounced_domain_or_another_horizon_is_refused():
    with pytest.raises(ValueError, match="poetry"):
        GistMetrics(32).update(synthetic(domains=("poetry",)))
    with pytest.raises(ValueError, match="horizon 32, expected is 64"):
        GistMetrics(64).update(synthetic())
