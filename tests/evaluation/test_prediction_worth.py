"""Whether what is expected tells what a block is worth, beside what LensNet sees already."""

import pytest
import torch
from small_base import small

from megactx.evaluation.prediction_worth import FORETOLD, NEWEST, TOKENS, correlations, partial, ranked, signals
from megactx.focus.edit_labels import continuation_nll
from megactx.gist import GistNet
from megactx.memory import MegaContextTree, WorkingContext
from megactx.memory.prediction import CONTROL, Readout


def test_the_worth_of_a_block_is_what_opening_it_saves_and_the_signals_are_cosines():
    base = small("llama")
    net = GistNet(base.width, base.embedding_rms(), block_size=4, num_heads=4, skip="none").eval()
    readout, ids = Readout(base.width), torch.randint(50, (110,), generator=torch.Generator().manual_seed(1))
    found = signals(base, readout, net, ids, horizon=6, share=0.25)
    tree = MegaContextTree.from_tokens(ids[None, :104], net, base)
    context = WorkingContext.recency(tree, 26)
    blocks = [i for i, lod in zip(context.index[0].tolist(), context.lod[0].tolist(), strict=True) if lod == 1]
    assert {len(values) for values in found.values()} == {len(blocks)} and len(blocks) >= 4
    with torch.no_grad():
        state = base(base.embed(ids[None, :104]), None)[0, -1]
        plain = continuation_nll(base, context, ids[None, 104:]).mean()
        for number, block in enumerate(blocks):
            gist = tree.gists(1)[0, block]
            assert abs(float(found[FORETOLD][number]) - float(torch.cosine_similarity(gist, readout(state), 0))) < 1e-4
            assert (
                abs(float(found[NEWEST][number]) - float(torch.cosine_similarity(gist, tree.gists(1)[0, -1], 0))) < 1e-4
            )
            lod = torch.cat(
                [
                    context.lod[0, : (at := context.lod[0].eq(1).nonzero()[number, 0])],
                    torch.zeros(4).long(),
                    context.lod[0, at + 1 :],
                ]
            )
            index = torch.cat([context.index[0, :at], block * 4 + torch.arange(4), context.index[0, at + 1 :]])
            after = continuation_nll(
                base, WorkingContext(tree, lod[None], index[None], context.counts + 3, 1000), ids[None, 104:]
            )
            assert abs(float(found["worth"][number]) - float(plain - after.mean())) < 1e-4


def by_places(a, b) -> float:
    places = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    return float(torch.corrcoef(places)[0, 1])


def test_correlations_are_those_of_ranks_and_what_is_known_already_is_taken_out():
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 200, generator=generator)
    assert ranked(a, a.exp()) == pytest.approx(1, abs=1e-6) and ranked(a, -a) == pytest.approx(-1, abs=1e-6)
    assert ranked(a + b, b + c) == pytest.approx(by_places(a + b, b + c), abs=1e-5)
    assert ranked(a, torch.ones(200)) == 0
    assert abs(partial(a + 0.1 * b, a + 0.1 * c, a)) < 0.2 < 0.9 < ranked(a + 0.1 * b, a + 0.1 * c)
    texts = [{FORETOLD: a, CONTROL: b, NEWEST: c, TOKENS: c, "worth": a}] * 3
    found = correlations(texts)
    assert found[FORETOLD]["rank"].point == pytest.approx(1) and "beside" not in found[TOKENS]
    assert found[FORETOLD]["beside"].point > 0.98 and abs(found[NEWEST]["rank"].point) < 0.2
