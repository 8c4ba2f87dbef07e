"""The price is the smallest at which edits fit the budget: equal to trying every price that could matter."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megactx.focus import Moves
from megactx.focus.price import price, signed_scores

K = 4
fast = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def legal_moves(kinds: list[list[str]]) -> Moves:
    """Rows of entries: g a gist, s one of K siblings that may collapse, G both, anything else neither."""
    w = max(len("".join(row)) for row in kinds)
    expand, first = torch.zeros(len(kinds), w, dtype=torch.bool), torch.full((len(kinds), w), -1)
    for b, row in enumerate(kinds):
        column = 0
        for part in row:
            for offset, kind in enumerate(part):
                expand[b, column + offset] = kind in "gG"
                first[b, column + offset] = column if kind in "sG" else -1
            column += len(part)
    return Moves(expand, first)


# Few different values, so that many are equal; some negative, and one so small that float32 ends there.
worth = st.one_of(st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, 1e-45, 2.5]), st.floats(-2, 3, width=32))


@st.composite
def cases(draw):
    parts = st.lists(st.sampled_from(["g", "-", "s" * K, "G" * K]), min_size=1, max_size=8)
    legal = legal_moves(draw(st.lists(parts, min_size=1, max_size=3)))
    b, w = legal.expand.shape
    values = draw(st.lists(worth, min_size=2 * b * w, max_size=2 * b * w))
    v_down, v_keep = torch.tensor(values).view(2, b, w)
    slack = torch.tensor(draw(st.lists(st.integers(-14, 20), min_size=b, max_size=b)))
    return v_down, v_keep, legal, slack


def needed(p: float, down: list[float], keep: list[float]) -> int:
    return (K - 1) * (sum(v > p for v in down) - sum(v < p for v in keep))


def slow_price(down: list[float], keep: list[float], slack: int) -> float:
    above = torch.nextafter(torch.tensor(keep), torch.tensor(torch.inf)).tolist()
    tried = sorted({0.0, *(p for p in down + above if p > 0)})
    needs = [needed(p, down, keep) for p in tried]
    return next(p for p, need in zip(tried, needs, strict=True) if need <= max(slack, min(needs)))


@pytest.mark.slow
@fast
@given(cases(), st.sampled_from([0.0, 0.25, 1e-3]))
def test_the_price_is_the_smallest_that_balances(case, margin):
    v_down, v_keep, legal, slack = case
    found = price(v_down, v_keep, legal, slack, K, margin)
    for b in range(len(slack)):
        down = (v_down - margin)[b][legal.expand[b]].tolist()
        keep = (v_keep + margin)[b][legal.leads[b]].tolist()
        assert found[b].item() == slow_price(down, keep, int(slack[b]))


@fast
@given(cases(), st.floats(0, 3, width=32), st.floats(0.015625, 10, width=32))
@example((torch.ones(1, 4), torch.zeros(1, 4), legal_moves([["GGGG"]]), torch.zeros(1)), 0.5, 1.0)
def test_scores_are_those_of_the_formula(case, p, tau):
    v_down, v_keep, legal, _ = case
    b, w = v_down.shape
    found = signed_scores(v_down, v_keep, legal, torch.full((b,), p), torch.tensor(tau))
    for row in range(b):
        for column in range(w):
            first = int(legal.first[row, column])
            expand = max(0.0, math.tanh((v_down[row, column].item() - p) / tau)) if legal.expand[row, column] else 0.0
            collapse = min(0.0, math.tanh((v_keep[row, first].item() - p) / tau)) if first >= 0 else 0.0
            if abs(expand + collapse) > 1e-5 or expand == 0 or collapse == 0:
                expected = expand if expand >= -collapse else collapse
                assert found[row, column].item() == pytest.approx(expected, abs=1e-5)
            else:  # as large as each other: rounding decides
                assert abs(found[row, column].item()) == pytest.approx(expand, abs=1e-4)


def test_where_both_are_as_large_the_gist_is_to_be_expanded():
    legal = legal_moves([["GGGG"]])
    scores = signed_scores(torch.ones(1, 4), torch.zeros(1, 4), legal, torch.tensor([0.5]), 1.0)
    assert (scores > 0.4).all()


def test_what_is_not_legal_is_not_read():
    legal = legal_moves([["g", "-", "s" * K, "g"], ["-", "-"]])
    nan = torch.full(legal.expand.shape, torch.nan)
    v_down, v_keep = torch.where(legal.expand, 1.0, nan), torch.where(legal.leads, 0.5, nan)
    now = price(v_down, v_keep, legal, torch.tensor([3, 0]), K)
    assert now.tolist() == [torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item(), 0.0]
    scores = signed_scores(v_down, v_keep, legal, now, 1.0)
    assert not scores.isnan().any() and not scores[1].any()


def test_rows_do_not_know_of_each_other():
    torch.manual_seed(0)
    legal = legal_moves([["g", "s" * K, "G" * K, "g"], ["G" * K, "g", "-"], ["-"]])
    v_down, v_keep, slack = torch.randn(3, 10), torch.randn(3, 10), torch.tensor([0, 3, -3])
    together = price(v_down, v_keep, legal, slack, K)
    for b in range(3):
        one = slice(b, b + 1)
        alone = price(v_down[one], v_keep[one], Moves(legal.expand[one], legal.first[one]), slack[one], K)
        assert together[b] == alone[0]


def test_scores_have_a_gradient_where_they_are_not_0_and_nowhere_nan():
    legal = legal_moves([["g", "g", "s" * K, "-"]])
    v_down = torch.tensor([[2.0, 0.1] + [torch.inf] * 5], requires_grad=True)
    v_keep = torch.tensor([[torch.nan] * 2 + [0.2] * 4 + [torch.nan]], requires_grad=True)
    signed_scores(v_down, v_keep, legal, torch.tensor([1.0]), 1.0).sum().backward()
    assert (v_down.grad != 0).tolist() == [[True] + [False] * 6]
    assert (v_keep.grad != 0).tolist() == [[False] * 2 + [True] + [False] * 4]


@pytest.mark.parametrize("tau", [0.0, -1.0, torch.tensor(torch.nan)])
def test_a_unit_of_nothing_is_refused(tau):
    legal = legal_moves([["g"]])
    with pytest.raises(ValueError, match="tau="):
        signed_scores(torch.ones(1, 1), torch.ones(1, 1), legal, torch.zeros(1), tau)
