"""The losses of LensNet against plain loops."""

import math

import pytest
import torch
from windows import K, small_base, tree_of, window

from megactx.focus import moves
from megactx.focus.objectives import illegal_mass, net_mass, preference_loss, value_loss


def test_the_value_loss_is_huber_and_a_hinge_over_pairs_of_one_window_that_differ():
    generator = torch.Generator().manual_seed(0)
    row = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    values, estimates = (0.2 * torch.randn(7, generator=generator) for _ in range(2))
    tau = torch.tensor(0.04)
    huber = [0.5 * d * d if d < 0.2 else 0.2 * (d - 0.1) for d in (estimates - values).abs().tolist()]
    hinge = []
    for i in range(7):
        for j in range(i):
            if row[i] == row[j] and abs(values[i] - values[j]) > 0.02:
                sign = math.copysign(1, values[i] - values[j])
                hinge.append(max(0.0, 0.1 - sign * float(estimates[i] - estimates[j]) / 0.04))
    losses = value_loss(estimates, values, row, tau, pair_weight=0.5)
    assert losses["huber"].item() == pytest.approx(sum(huber) / 7, rel=1e-5)
    assert losses["pairs"].item() == pytest.approx(sum(hinge) / len(hinge), rel=1e-5)
    assert losses["loss"].item() == pytest.approx(sum(huber) / 7 + 0.5 * sum(hinge) / len(hinge), rel=1e-5)


def test_without_pairs_the_value_loss_is_huber_alone():
    losses = value_loss(torch.tensor([0.1]), torch.tensor([0.0]), torch.tensor([0]), torch.tensor(0.1), 0.5)
    assert losses["pairs"] == 0 and losses["loss"] == losses["huber"] > 0


def pair():
    tree = tree_of(small_base())
    a, b = window(tree, 60, seed=1), window(tree, 60, seed=2)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(*context.lod.shape, 2, generator=generator) for context in (a, b)]
    return values, (moves(a, 8), moves(b, 8)), (a, b)


def test_a_preference_is_won_by_more_valuable_detail_and_less_hidden_detail():
    (va, vb), (la, lb), (a, b) = pair()
    better, tau = torch.tensor([0.3, -0.2]), torch.tensor(0.5)

    def worth(values, context, legal, row):
        total, count = 0.0, 0
        for column in range(int(context.counts[row])):
            first = int(legal.first[row, column])
            if context.lod[row, column] > 0:
                total -= float(values[row, column, 0])
            if first >= 0:
                total += float(values[row, first : first + K, 1].mean())
            count += int(context.lod[row, column] > 0 or first >= 0)
        return total / count

    expected = 0.0
    for row in range(2):
        s = worth(va, a, la, row) - worth(vb, b, lb, row)
        t = float(better[row])
        expected += math.log1p(math.exp(-math.copysign(1, t) * s / 0.5)) * abs(t) / 2
    losses = preference_loss(better, va, vb, la, lb, tau)
    assert losses["preference"].item() == pytest.approx(expected, rel=1e-4)
    rest = 0.1 * losses["budget"] + 0.3 * losses["legality"]
    assert losses["loss"].item() == pytest.approx(float(losses["preference"] + rest), rel=1e-5)


def test_the_net_mass_is_in_balance_at_zero_and_one_sided_at_one():
    (values, _), (legal, _), _ = pair()
    tau = torch.tensor(0.1)
    assert (net_mass(values.abs(), legal, tau) > 0.99).all()
    assert (net_mass(-values.abs(), legal, tau) < -0.99).all()
    assert net_mass(torch.zeros_like(values), legal, tau).tolist() == [0, 0]


def test_only_values_where_nothing_is_legal_are_illegal_mass():
    (values, _), (legal, _), _ = pair()
    allowed = torch.stack([legal.expand, legal.first >= 0], dim=-1)
    assert illegal_mass(values * allowed, legal, torch.tensor(0.1)) == 0
    wrong = values[~allowed]
    assert illegal_mass(values, legal, torch.tensor(0.1)).item() == pytest.approx(
        float((wrong / 0.1).square().mean()), rel=1e-5
    )
