import pytest
import torch

from megactx.evaluation.metrics import recovery
from megactx.evaluation.sums import MeanDifference, RatioOfSums, loggable


def passages(count=20, tokens=6, seed=0):
    """NLL [M, R] under the full context, with gists, and without them; and the domains."""
    generator = torch.Generator().manual_seed(seed)
    full, gist, without = (torch.rand(count, tokens, generator=generator) + shift for shift in (0, 0.3, 1))
    return full, gist, without, ["code" if i % 3 else "narrative" for i in range(count)]


def test_recovery_is_a_ratio_of_sums_over_tokens_overall_and_per_domain():
    full, gist, without, domain = passages()
    metric = RatioOfSums("copy_recovery")
    for rows in (slice(0, 3), slice(3, None)):
        metric.update(full[rows], gist[rows], without[rows], domain[rows])
    got = metric.compute()
    for prefix, rows in (("", range(20)), ("code/", [i for i in range(20) if i % 3])):
        lost = sum(float(gist[i, r]) - float(full[i, r]) for i in rows for r in range(6))
        cost = sum(float(without[i, r]) - float(full[i, r]) for i in rows for r in range(6))
        assert got[f"{prefix}copy_recovery"].item() == pytest.approx(1 - lost / cost, rel=1e-9)
        assert got[f"{prefix}copy_recovery_cost"].item() == pytest.approx(cost / (6 * len(rows)), rel=1e-9)
    assert got["copy_recovery"].item() == pytest.approx(recovery(full, without, gist), rel=1e-9)


def test_passages_of_different_lengths_count_by_their_tokens():
    metric = RatioOfSums()
    metric.update(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), ["code"])  # nothing of 1 nat
    metric.update(torch.zeros(1, 9), torch.zeros(1, 9), torch.ones(1, 9), ["code"])  # all of 9 nats
    assert metric.compute()["recovery"].item() == pytest.approx(0.9)


def test_recovery_is_never_clipped_and_undefined_where_being_without_costs_nothing():
    full, gist, without, domain = passages()
    metric = RatioOfSums()
    metric.update(full, without + 1, without, domain)
    assert metric.compute()["recovery"] < 0
    metric.reset()
    metric.update(full, gist, full + 0.009, domain)
    got = metric.compute()
    assert got["recovery"].isnan() and got["recovery_cost"].item() == pytest.approx(0.009, rel=1e-4)
    metric.reset()
    metric.update(full, gist, full - 1, domain)  # without is better: still no ratio
    assert metric.compute()["recovery"].isnan()


def test_history_recovery_and_gain_at_equal_budget_from_the_nll_of_their_segments():
    """65 % recovered, and the gists beat as many raw tokens by 0.05 nat."""
    full = torch.full((4, 8), 2.0)
    metric, gain = RatioOfSums("history_recovery"), MeanDifference("gain_at_equal_budget")
    metric.update(full, full + 0.07, full + 0.2, ["narrative"] * 4)
    gain.update(full + 0.12, full + 0.07, ["narrative"] * 4)
    assert metric.compute()["narrative/history_recovery"].item() == pytest.approx(0.65, rel=1e-5)
    assert gain.compute()["gain_at_equal_budget"].item() == pytest.approx(0.05, rel=1e-5)


def test_a_mean_difference_is_per_token():
    full, gist, _, domain = passages()
    metric = MeanDifference("level2_dnll")
    metric.update(gist[:5], full[:5], domain[:5])
    metric.update(gist[5:, :2], full[5:, :2], domain[5:])
    total = (gist - full)[:5].double().sum() + (gist - full)[5:, :2].double().sum()
    assert metric.compute()["level2_dnll"].item() == pytest.approx(total.item() / (5 * 6 + 15 * 2), rel=1e-6)


def test_without_any_passage_all_is_undefined():
    with pytest.warns(UserWarning, match="compute"):
        assert all(value.isnan() for value in RatioOfSums().compute().values())
    metric = MeanDifference("gain")
    metric.update(torch.empty(0, 3), torch.empty(0, 3), [])
    assert list(metric.compute()) == ["gain"] and metric.compute()["gain"].isnan()


def test_a_nan_stays_in_its_domain():
    metric = MeanDifference("gain")
    metric.update(torch.tensor([[float("nan")], [1.0]]), torch.zeros(2, 1), ["code", "narrative"])
    got = metric.compute()
    assert got["gain"].isnan() and got["code/gain"].isnan() and got["narrative/gain"] == 1


def test_an_unannounced_domain_is_refused():
    full, gist, without, domain = passages()
    with pytest.raises(ValueError, match="poetry"):
        RatioOfSums().update(full, gist, without, ["poetry"] * 20)
    RatioOfSums(domains=["poetry"]).update(full, gist, without, ["poetry"] * 20)


def test_only_defined_single_numbers_are_logged():
    values = {"dnll": torch.tensor(1.0), "recovery": torch.tensor(float("nan")), "dnll_by_offset": torch.ones(4)}
    assert loggable(values) == {"dnll": torch.tensor(1.0)}
