"""The losses of LensNet against plain loops."""

import pytest
import torch
from windows import small_base, tree_of, window

from megactx.focus import moves
from megactx.focus.objectives import illegal_mass, net_mass, value_loss


def test_the_value_loss_is_huber():
    generator = torch.Generator().manual_seed(0)
    values, estimates = (0.2 * torch.randn(7, generator=generator) for _ in range(2))
    huber = [0.5 * d * d if d < 0.2 else 0.2 * (d - 0.1) for d in (estimates - values).abs().tolist()]
    assert value_loss(estimates, values).item() == pytest.approx(sum(huber) / 7, rel=1e-5)


def pair():
    tree = tree_of(small_base())
    a, b = window(tree, 60, seed=1), window(tree, 60, seed=2)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(*context.lod.shape, 2, generator=generator) for context in (a, b)]
    return values, (moves(a, 8), moves(b, 8))


def test_the_net_mass_is_in_balance_at_zero_and_one_sided_at_one():
    (values, _), (legal, _) = pair()
    tau = torch.tensor(0.1)
    assert (net_mass(values.abs(), legal, tau) > 0.99).all()
    assert (net_mass(-values.abs(), legal, tau) < -0.99).all()
    assert net_mass(torch.zeros_like(values), legal, tau).tolist() == [0, 0]


def test_only_values_where_nothing_is_legal_are_illegal_mass():
    (values, _), (legal, _) = pair()
    allowed = torch.stack([legal.expand, legal.first >= 0], dim=-1)
    assert illegal_mass(values * allowed, legal, torch.tensor(0.1)) == 0
    wrong = values[~allowed]
    assert illegal_mass(values, legal, torch.tensor(0.1)).item() == pytest.approx(
        float((wrong / 0.1).square().mean()), rel=1e-5
    )
