import pytest
import torch

from megactx.evaluation.sums import DomainSums, loggable


class Mean(DomainSums):
    """The mean of one value per row."""

    def __init__(self, **settings):
        super().__init__({"total": ()}, **settings)

    def update(self, values, domain):
        self.add(domain, total=values)

    def figures(self, sums):
        return {"mean": sums["total"] / sums["blocks"]}


def test_sums_over_batches_give_the_figures_of_all_rows_overall_and_per_domain():
    values, domain = torch.arange(20.0), ["code" if i % 3 else "narrative" for i in range(20)]
    metric = Mean()
    for rows in (slice(0, 3), slice(3, None)):
        metric.update(values[rows], domain[rows])
    got = metric.compute()
    for prefix, rows in (("", range(20)), ("code/", [i for i in range(20) if i % 3])):
        assert got[f"{prefix}mean"].item() == pytest.approx(sum(rows) / len(rows), rel=1e-9)


def test_without_any_row_all_is_undefined():
    with pytest.warns(UserWarning, match="compute"):
        assert all(value.isnan() for value in Mean().compute().values())
    metric = Mean()
    metric.update(torch.empty(0), [])
    assert list(metric.compute()) == ["mean"] and metric.compute()["mean"].isnan()


def test_a_nan_stays_in_its_domain():
    metric = Mean()
    metric.update(torch.tensor([float("nan"), 1.0]), ["code", "narrative"])
    got = metric.compute()
    assert got["mean"].isnan() and got["code/mean"].isnan() and got["narrative/mean"] == 1


def test_an_unannounced_domain_is_refused():
    with pytest.raises(ValueError, match="poetry"):
        Mean().update(torch.ones(2), ["poetry"] * 2)
    Mean(domains=["poetry"]).update(torch.ones(2), ["poetry"] * 2)


def test_only_defined_single_numbers_are_logged():
    values = {"dnll": torch.tensor(1.0), "recovery": torch.tensor(float("nan")), "dnll_by_offset": torch.ones(4)}
    assert loggable(values) == {"dnll": torch.tensor(1.0)}
