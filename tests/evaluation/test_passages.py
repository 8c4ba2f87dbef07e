"""Copies and gists of gists: every figure is that of a plain forward over the document as it is described."""

import pytest
import torch
from plain_forward import VOCABULARY, WIDTH, document, plain_nll, tiny_base

from megactx.evaluation.metrics import recovery
from megactx.evaluation.passages import copies, measure_copies, measure_level
from megactx.gist import GistNet

K, D, H = 4, 10, 6


@pytest.fixture(scope="module")
def base():
    return tiny_base()


def net(base, **settings) -> GistNet:
    torch.manual_seed(1)
    return GistNet(WIDTH, base.embedding_rms(), **{"block_size": K, "num_heads": 4, "skip": "none", **settings})


def documents(lengths=(60, 17, 41)) -> list[dict]:
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]
    domains = ["code", "narrative", "structured"]
    return [document(ids, [K], domains[i % 3], i) for i, ids in enumerate(texts)]


def test_a_copy_stands_at_its_distance_and_the_rest_of_the_document_is_as_it_was():
    before = documents()
    after = copies(before, K, D)
    assert [int(d["document"]) for d in after] == [0, 2]  # 17 tokens have no room for sink, block, distance and copy
    assert after[0]["block_starts"].tolist() == [[4, 24]]  # 2 x 4 + 10 -> 20 apart
    assert after[1]["block_starts"].tolist() == [[4]]
    old, new = before[0]["ids"][0], after[0]["ids"][0]
    changed = [i for s in (4, 24) for i in range(s + K + D, s + 2 * K + D)]
    for s in (4, 24):
        assert torch.equal(new[s + K + D : s + 2 * K + D], old[s : s + K])
    kept = [i for i in range(60) if i not in changed]
    assert torch.equal(new[kept], old[kept])
    assert torch.equal(before[0]["ids"][0], documents()[0]["ids"][0]), "the caller's documents were changed"


def test_the_shortest_document_with_room_for_a_copy_is_used_and_padding_is_none():
    exact, short = documents((K + 2 * K + D,)), documents((K + 2 * K + D - 1,))
    assert copies(exact, K, D)[0]["block_starts"].tolist() == [[K]] and copies(short, K, D) == []
    padded = {**short[0], "ids": torch.cat([short[0]["ids"], torch.zeros(1, 20, dtype=torch.long)], dim=1)}
    assert copies([padded], K, D) == []


def test_so_many_copies_come_from_as_many_documents_as_possible():
    counts = [
        sum(d["block_starts"].numel() for d in copies(documents((200, 60, 41)), K, D, blocks)) for blocks in (1, 3, 5)
    ]
    assert counts == [1, 3, 5]
    assert len(copies(documents((200, 60, 41)), K, D, 2)) == 2
    for settings, message in (({"blocks": 0}, "blocks=0"), ({"distance": 0}, "distance=0")):
        with pytest.raises(ValueError, match=message):
            copies(documents(), K, **{"distance": D, **settings})


@pytest.mark.parametrize("position", ["centre", "end"])
def test_copy_recovery_is_that_of_plain_forwards_with_the_first_occurrence_kept_replaced_and_dropped(base, position):
    gistnet = net(base, position=position).eval()
    scores = measure_copies(base, {"gistnet": gistnet}, documents(), (D, 1000))
    assert list(scores) == [D], "no document has room for a distance of 1,000"
    scores = scores[D]
    assert scores.full.shape == (3, K) and {"last token", "random gist", "another block's gist"} <= {*scores.carriers}
    full, gist, drop = [], [], []
    for made in copies(documents(), K, D):
        ids = made["ids"][0]
        for s in made["block_starts"][0].tolist():
            vector = gistnet.encode_block(base.embed(ids[None, s : s + K]))[0].detach()
            full.append(plain_nll(base, ids, s, K, D + K, at=None)[D:])
            gist.append(plain_nll(base, ids, s, K, D + K, vector, K // 2 if position == "centre" else K - 1)[D:])
            drop.append(plain_nll(base, ids, s, K, D + K)[D:])
    full, gist, drop = torch.stack(full), torch.stack(gist), torch.stack(drop)
    torch.testing.assert_close(scores.full, full, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores.carriers["gistnet"], gist, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores.drop, drop, rtol=1e-4, atol=1e-4)
    cost = (drop - full).double().sum()
    expected = 1 - (gist - full).double().sum() / cost if cost / full.numel() >= 0.01 else torch.tensor(torch.nan)
    value = recovery(scores.full, scores.drop, scores.carriers["gistnet"])
    assert value == pytest.approx(expected.item(), rel=1e-3, nan_ok=True)


@pytest.mark.parametrize("position", ["centre", "end"])
def test_a_gist_of_gists_costs_what_a_plain_forward_with_it_costs(base, position):
    gistnet = net(base, position=position).eval()
    scores = measure_level(base, {"gistnet": gistnet}, documents(), H)
    assert scores.start.tolist() == [16, 32, 16] and scores.horizon == H  # on the grid of 16, never over the sink
    span = K * K
    for row, (text, s) in enumerate(zip(scores.document.tolist(), scores.start.tolist(), strict=True)):
        ids = documents()[text]["ids"][0]
        below = torch.stack([gistnet.encode_block(base.embed(ids[None, a : a + K]))[0] for a in range(s, s + span, K)])
        vector = gistnet.encode_block(below[None])[0].detach()
        nll = plain_nll(base, ids, s, span, H, vector, span // 2 if position == "centre" else span - 1)
        torch.testing.assert_close(scores.carriers["gistnet"][row], nll, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scores.full[row], plain_nll(base, ids, s, span, H, at=None), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scores.drop[row], plain_nll(base, ids, s, span, H), rtol=1e-4, atol=1e-4)
        last = plain_nll(base, ids, s, span, H, base.embed(ids[None, s + span - 1])[0], span - 1)
        torch.testing.assert_close(scores.carriers["last token"][row], last, rtol=1e-4, atol=1e-4)


def test_where_no_document_is_long_enough_there_is_no_hierarchical_consistency(base):
    exact, short = 2 * K * K + H, 2 * K * K + H - 1
    assert measure_level(base, {"gistnet": net(base)}, documents((short,)), H, with_controls=False) is None
    assert len(measure_level(base, {"gistnet": net(base)}, documents((exact,)), H, with_controls=False)) == 1


def test_dropout_is_off_while_measuring_and_back_afterwards(base):
    gistnet = net(base, dropout=0.5)
    assert gistnet.training
    one, two = (measure_level(base, {"gistnet": gistnet}, documents(), H, with_controls=False) for _ in range(2))
    assert torch.equal(one.carriers["gistnet"], two.carriers["gistnet"]) and gistnet.training
