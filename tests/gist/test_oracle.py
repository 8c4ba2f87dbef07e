"""Vectors fitted block by block: the ceiling of one-vector carriers."""

import pytest
import torch

from megactx.gist.carriers.history_oracle import HistoryOracle
from megactx.gist.carriers.last_token import LastToken
from megactx.gist.carriers.oracle import Oracle, _continued
from megactx.gist.history import with_carriers, with_everything
from megactx.gist.substitution import substituted
from megactx.lm.chunked_head import score
from megactx.lm.prefill import blocks, prefill, rows_at

K, H = 8, 6


@pytest.fixture(scope="module")
def read(make_base):
    base = make_base()
    ids, starts = torch.randint(3, 97, (1, 60)), torch.tensor([[8, 24, 40]])
    return base, prefill(base, ids), starts


def kl(base, prefill, starts, carrier):
    hidden = substituted(base, prefill, starts, carrier.vectors[None], [carrier.offset], K, H)
    teacher_rows = rows_at(prefill.hidden, starts + K - 1, H).flatten(0, 2)
    _, numbers = score(base, hidden.flatten(1, 3), teacher_rows, blocks(prefill.ids, starts + K, H).flatten())
    return numbers["kl"].view(3, H).mean(dim=1)


def test_a_fitted_vector_is_better_than_the_token_that_it_starts_from_for_every_block(read):
    base, prefill, starts = read
    before = kl(base, prefill, starts, LastToken(K).compress(base, prefill, starts))
    after = kl(base, prefill, starts, Oracle(H, K, samples=0, steps=30).compress(base, prefill, starts))
    assert (after < 0.7 * before).all()


def test_a_block_is_fitted_as_if_it_were_alone(read):
    base, prefill, starts = read
    oracle = Oracle(H, K, samples=0, steps=5)
    both = oracle.compress(base, prefill, starts).vectors[:, 1:2]
    alone = oracle.compress(base, prefill, starts[:, 1:2]).vectors
    torch.testing.assert_close(both, alone, rtol=1e-3, atol=1e-4)


def test_samples_are_tokens_and_the_same_for_the_same_seed(read):
    base, prefill, starts = read
    oracle = Oracle(H, K, samples=3, steps=3)
    sampled = oracle._sampled(base, prefill, starts + K)
    assert sampled.shape == (1, 3, 3, H) and sampled.min() >= 0 and sampled.max() < 97
    assert torch.equal(sampled, oracle._sampled(base, prefill, starts + K))


@torch.no_grad()
def test_a_continuation_over_the_full_context_is_the_teacher_itself(read):
    base, prefill, starts = read
    ids = blocks(prefill.ids, starts + K, H)[:, :, None]
    hidden = _continued(base, prefill, starts + K, ids)[:, :, 0]
    torch.testing.assert_close(hidden, rows_at(prefill.hidden, starts + K - 1, H), rtol=1e-4, atol=1e-4)


def test_it_works_inside_inference_mode(read):
    base, context, starts = read
    with torch.inference_mode():
        context = prefill(base, context.ids)
        carrier = Oracle(H, K, samples=0, steps=2).compress(base, context, starts)
    assert torch.isfinite(carrier.vectors).all()


def test_settings_that_are_not_allowed_are_refused_by_name():
    with pytest.raises(ValueError, match="oracle.samples=-1"):
        Oracle(H, K, samples=-1)
    with pytest.raises(ValueError, match="oracle.steps=0"):
        Oracle(H, K, steps=0)


@torch.no_grad()
@pytest.mark.parametrize("samples", [0, 2])
def test_the_vectors_of_a_history_are_fitted_to_the_segment_behind_them(read, samples):
    base, prefill, _ = read
    old, segment, recency = torch.tensor([[8, 16, 24]]), 2 * K, K
    starts = old[:, -1:] + K + recency
    wanted = with_everything(prefill, starts, segment).flatten(0, 2)
    targets = blocks(prefill.ids, starts, segment).flatten()

    def kl_of(carriers):
        hidden = with_carriers(base, prefill, starts, carriers, K, segment, recency)
        return score(base, hidden.flatten(0, 2)[None], wanted, targets)[1]["kl"].mean()

    oracle = HistoryOracle(segment, recency, K, samples=samples, steps=30)
    fitted = oracle.compress(base, prefill, old)
    assert fitted.vectors.shape == (1, 3, base.width)
    assert kl_of(fitted) < 0.9 * kl_of(LastToken(K).compress(base, prefill, old))
