"""With ``reuse=approximate`` entries keep the keys and values that they had, and only what is new is computed."""

import pytest
import torch
from test_incremental_prefill import assert_same, change, read
from windows import small_base, tree_of, window

from megactx.lm.masks import BEHIND
from megactx.runtime import Session, Settings
from megactx.runtime.approximate_prefill import ApproximatePrefill
from megactx.runtime.cache import KeyCache
from megactx.runtime.incremental_prefill import IncrementalPrefill


class Slow:
    """Entry by entry, a row of its own: what was read at the same place with the same embedding is taken as it was."""

    def __init__(self, base):
        self.base, self.known = base, {}

    def read(self, context, row: int) -> torch.Tensor:
        count = int(context.counts[row])
        embeddings, positions = context.to_tensor()[row, :count], context.positions()[row, :count]
        sigma = context.tree.encoder.spread(context.lods())
        now, hidden = {}, None
        for n in range(count):
            name = (int(positions[n]), embeddings[n].numpy().tobytes(), float(sigma[row, n]))
            if name in self.known and n < count - 1:
                now[name] = self.known[name]
                continue
            cache = KeyCache()
            for layer, parts in enumerate(zip(*now.values(), strict=True)) if now else ():
                cache.update(*(torch.cat([part[kind] for part in parts], dim=2) for kind in (0, 1)), layer)
            hidden = self.base(
                embeddings[None, n : n + 1], positions[None, n : n + 1], BEHIND, cache, sigma[row, n].view(1, 1)
            )
            now[name] = [(layer.keys[:, :, -1:].clone(), layer.values[:, :, -1:].clone()) for layer in cache.layers]
        self.known = now
        return hidden[0, -1]


def test_what_was_read_stays_and_what_is_new_is_computed_over_it_as_entry_by_entry():
    base, generator = small_base("llama"), torch.Generator().manual_seed(3)
    context = window(tree_of(base, gaussian_rope="damped"), budget=60, edits=0)
    context.budget, rows = 90, len(context.counts)
    assert rows > 1, "rows of one window differ in what they keep"
    prefill, slow, differs = ApproximatePrefill(base), [Slow(base) for _ in range(rows)], 0
    for _ in range(14):
        context = change(context, generator)
        read(prefill, context)
        expected = torch.stack([one.read(context, row) for row, one in enumerate(slow)])
        assert (prefill.hidden - expected).abs().max() < 1e-4 * expected.abs().max()
        exact = IncrementalPrefill(base)
        read(exact, context)
        differs += (prefill.hidden - exact.hidden).abs().max() > 1e-3 * exact.hidden.abs().max()
        assert (prefill.reused < prefill.lengths).all() or torch.equal(prefill.reused, prefill.lengths)
    assert differs > 3, "the reference would not see a reader that computes all"
    assert prefill.reused.sum() > 0.8 * prefill.lengths.sum()


def test_without_edits_it_is_the_exact_reader_new_tokens_and_a_second_reading_included():
    base = small_base("llama")
    context = window(tree_of(base), budget=60, edits=3)
    context.budget = 90
    prefill, exact = ApproximatePrefill(base), IncrementalPrefill(base)
    for reader in (prefill, exact):
        _, behind = read(reader, context)
    assert_same(prefill, exact, context)
    read(prefill, context)
    assert torch.equal(prefill.reused, prefill.lengths), "nothing was computed"
    ids = torch.randint(97, (len(context.counts), 2))
    hidden = [reader.step(ids, behind[:, None] + torch.arange(2)) for reader in (prefill, exact)]
    torch.testing.assert_close(*hidden, rtol=1e-4, atol=1e-4)


def test_new_tokens_behind_a_mended_window_see_all_of_it():
    base, generator = small_base("llama"), torch.Generator().manual_seed(5)
    context = window(tree_of(base), budget=60, edits=0)
    context.budget, prefill = 90, ApproximatePrefill(base)
    for _ in range(6):
        context = change(context, generator)
        _, behind = read(prefill, context)
    ids = torch.randint(97, (len(context.counts), 1))
    after = prefill.step(ids, behind[:, None])[:, 0]
    for row, count in enumerate(context.counts.tolist()):
        cache = KeyCache()
        there = torch.cat([columns[3] for columns in prefill.columns], dim=1)[row, : prefill.cache.get_seq_length()]
        for layer, kept in enumerate(prefill.cache.layers):
            own = [part[row : row + 1, :, :-1][:, :, there[:-1]] for part in (kept.keys, kept.values)]
            assert own[0].shape[2] == count
            cache.update(*own, layer)
        alone = base(base.embed(ids[row : row + 1]), behind[row : row + 1, None], BEHIND, cache)
        torch.testing.assert_close(alone[0, 0], after[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [400, pytest.param(700, marks=pytest.mark.slow)])
def test_a_session_keeps_nearly_all_and_says_nearly_what_an_exact_one_says(controller, ids, count):
    """The base takes 512 positions, behind which an edit moves others."""
    texts = ids(count)

    def said(reuse: str):
        session, kept = Session(controller(reuse=reuse)), []
        session.observers.append(lambda event: kept.append(event.reuse))
        nll = []
        for at in range(0, count, 20):
            nll.append(float(session.append(texts[at : at + 20], score=True).sum()))
        return nll, [value for value in kept if value is not None]

    exact, few = said("exact")
    approximate, most = said("approximate")
    assert sum(most) / len(most) > sum(few) / len(few) and (count > 512 or sum(most) / len(most) > 0.6)
    assert approximate != exact and sum(approximate) == pytest.approx(sum(exact), rel=0.05)


@pytest.mark.parametrize("settings", [{"graphs": True}, {"attention": "mega"}])
def test_it_does_not_go_with_what_reads_in_another_way(settings):
    with pytest.raises(ValueError, match="is not allowed with reuse=approximate"):
        Settings(reuse="approximate", **settings)
