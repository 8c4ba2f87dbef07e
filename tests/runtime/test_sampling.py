"""Choosing a token: greedy, filtered, drawn; and what is not allowed."""

import pytest
import torch

from megactx.runtime import Sampling

NOTHING = torch.zeros(1, 0, dtype=torch.long)


def logits(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 2


def drawn(sampling, scores, count=4000, recent=NOTHING):
    rows = scores.expand(count, -1)
    found = sampling.choose(rows, recent.expand(count, -1), torch.zeros(count).long())
    return torch.bincount(found, minlength=scores.shape[1]) / count


def test_temperature_0_is_greedy():
    scores = logits(5, 20)
    assert torch.equal(Sampling().choose(scores, NOTHING, torch.zeros(5)), scores.argmax(-1))


def test_draws_follow_the_distribution():
    scores = logits(1, 6)
    assert torch.allclose(drawn(Sampling(temperature=1), scores), scores[0].softmax(-1), atol=0.03)
    assert torch.allclose(drawn(Sampling(temperature=3), scores), (scores[0] / 3).softmax(-1), atol=0.03)


def test_top_k_and_top_p_leave_the_likeliest():
    scores = logits(1, 30)
    likeliest = scores[0].argsort(descending=True)
    found = drawn(Sampling(temperature=1, top_k=3), scores).nonzero()[:, 0]
    assert {*found.tolist()} == {*likeliest[:3].tolist()}
    share = scores[0].softmax(-1)[likeliest].cumsum(0)
    wanted = int((share < 0.7).sum()) + 1
    found = drawn(Sampling(temperature=1, top_p=0.7), scores).nonzero()[:, 0]
    assert {*found.tolist()} == {*likeliest[:wanted].tolist()}


def test_the_repetition_penalty_counts_recent_tokens():
    scores = torch.tensor([[2.0, 1.5, -1.0]])
    assert Sampling(repetition_penalty=2.0).choose(scores, torch.tensor([[0]]), torch.zeros(1)).tolist() == [1]
    assert Sampling(repetition_penalty=2.0).choose(scores, torch.tensor([[2]]), torch.zeros(1)).tolist() == [0]


def test_a_draw_depends_on_seed_row_and_place_and_on_nothing_else():
    scores, place = logits(1, 500).expand(6, -1), torch.arange(6)
    sampling = Sampling(temperature=2.0, seed=3)
    first = sampling.choose(scores, NOTHING.expand(6, -1), place)
    torch.rand(10)
    assert torch.equal(first, sampling.choose(scores, NOTHING.expand(6, -1), place))
    assert len({*first.tolist()}) > 1
    assert not torch.equal(first, Sampling(temperature=2.0, seed=4).choose(scores, NOTHING.expand(6, -1), place))
    assert not torch.equal(first, sampling.choose(scores, NOTHING.expand(6, -1), place + 100))


@pytest.mark.parametrize(
    "wrong",
    [
        dict(temperature=-1),
        dict(temperature=float("inf")),
        dict(temperature=float("nan")),
        dict(top_k=-1),
        dict(top_p=0),
        dict(top_p=1.5),
        dict(repetition_penalty=0),
        dict(seed=-1),
    ],
)
def test_what_is_not_allowed_is_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name}=.* is not allowed"):
        Sampling(**wrong)


def test_nan_logits_are_refused():
    with pytest.raises(ValueError, match="the base LM gives NaN"):
        Sampling().choose(torch.full((1, 4), torch.nan), NOTHING, torch.zeros(1))
