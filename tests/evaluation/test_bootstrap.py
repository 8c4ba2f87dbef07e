import math

import numpy as np
import pytest
import torch
from block_scores import synthetic

from megactx.evaluation.bootstrap import (
    LEAST_NATS,
    LEAST_RECOVERY,
    Interval,
    difference_intervals,
    mean_interval,
    recovery_intervals,
    reverse,
    verdict,
)
from megactx.evaluation.metrics import recovery


def test_intervals_cover_the_known_recovery_about_as_often_as_they_say():
    hits = 0
    for seed in range(40):
        scores = synthetic(blocks=200, noise=0.2, seed=seed, recovery={"gistnet": 0.6})
        _, low, high = recovery_intervals(scores, ["gistnet"])["gistnet"]
        hits += low < 0.6 < high
    assert 33 <= hits  # 95 % of 40 is 38


def test_points_are_the_plain_recoveries_of_each_range_and_domain():
    scores = synthetic()
    code = [index for index, name in enumerate(scores.domain) if name == "code"]
    assert torch.equal(scores.by_domain()["code"].drop, scores.drop[code])
    for first in (0, 4):
        for own in scores.by_domain().values():
            value = {name: recovery(own.full, own.drop, nll, first) for name, nll in own.carriers.items()}
            got = recovery_intervals(own, ["gistnet"], first)["gistnet"]
            assert got.point == pytest.approx(value["gistnet"]) and got.low < got.point < got.high
            difference = difference_intervals(own, "gistnet", ["last token"], first)["last token"]
            assert difference.point == pytest.approx(value["gistnet"] - value["last token"])


def test_identical_carriers_differ_by_exactly_nothing():
    scores = synthetic(noise=0.5)
    scores.carriers["twin"] = scores.carriers["gistnet"].clone()
    assert difference_intervals(scores, "gistnet", ["twin"])["twin"] == (0, 0, 0)


def test_pairing_makes_a_difference_sharper_than_either_recovery():
    scores = synthetic(blocks=200, noise=0.4, recovery={"gistnet": 0.6})
    scores.carriers["worse"] = scores.carriers["gistnet"] + 0.02
    alone = recovery_intervals(scores, ["gistnet"])["gistnet"]
    paired = difference_intervals(scores, "gistnet", ["worse"])["worse"]
    assert paired.high - paired.low < 0.2 * (alone.high - alone.low)
    assert verdict(paired) == "above"


def test_documents_are_resampled_not_blocks():
    # Ten copies of the same block in each document carry no more information than one.
    scores = synthetic(blocks=40, per_document=1, noise=0.4)
    copies = {
        name: torch.cat([values] * 10) for name, values in scores._per_offset().items() if name in ("full", "drop")
    }
    many = type(scores)(
        **copies,
        carriers={"gistnet": torch.cat([scores.carriers["gistnet"]] * 10)},
        domain=scores.domain * 10,
        document=torch.cat([scores.document] * 10),
        start=torch.arange(400),
    )
    one, ten = recovery_intervals(scores, ["gistnet"])["gistnet"], recovery_intervals(many, ["gistnet"])["gistnet"]
    assert one == pytest.approx(ten)


def test_an_interval_is_the_same_in_every_call_whatever_was_drawn_before():
    scores = synthetic()
    first = recovery_intervals(scores, ["gistnet"])
    torch.rand(3), np.random.rand(3)
    assert recovery_intervals(scores, ["gistnet"]) == first


@pytest.mark.parametrize("case", ["weak", "short", "one document"])
def test_what_cannot_be_told_is_undefined(case):
    if case == "weak":
        got = recovery_intervals(synthetic(cost=0.001), ["gistnet"])["gistnet"]
    elif case == "short":
        got = recovery_intervals(synthetic(horizon=4), ["gistnet"], first=4)["gistnet"]
    else:
        got = recovery_intervals(synthetic(blocks=5), ["gistnet"])["gistnet"]
        assert not math.isnan(got.point)
    assert math.isnan(got.low) and math.isnan(got.high)
    assert verdict(got) == "undefined"


def test_verdicts():
    assert verdict(Interval(0.1, 0.05, 0.2)) == "above"
    assert verdict(Interval(0.1, -0.05, 0.2)) == "within the interval"
    assert verdict(Interval(-0.1, -0.2, -0.05)) == "below"


def test_mean_interval_is_over_documents():
    document = torch.arange(30) // 3
    values = document.double() + torch.tensor([0.0, 1.0, 2.0]).repeat(10)
    mean, low, high = mean_interval(document, values)
    assert mean == pytest.approx(values.mean().item())
    # Standard error of 10 document means 0..9 is about 0.91.
    assert high - low == pytest.approx(2 * 1.96 * 0.91, rel=0.15)


@pytest.mark.parametrize(
    ("interval", "least", "said"),
    [
        (Interval(0.004, 0.001, 0.007), LEAST_RECOVERY, "within the interval"),  # sure, and nothing
        (Interval(0.006, 0.001, 0.011), LEAST_RECOVERY, "above"),
        (Interval(-0.006, -0.011, -0.001), LEAST_RECOVERY, "below"),
        (Interval(-0.003, -0.004, -0.001), LEAST_NATS, "below"),
        (Interval(0.1, -0.1, 0.3), LEAST_RECOVERY, "within the interval"),
    ],
)
def test_a_claim_is_about_a_difference_of_some_size(interval, least, said):
    assert verdict(interval, least) == said
    back = reverse(interval._asdict())
    assert verdict(back, least) == {"above": "below", "below": "above"}.get(said, said)
