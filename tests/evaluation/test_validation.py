"""The whole dict of a validation: each figure beside a plain computation from plain forwards."""

import pytest
import torch
import torch.nn.functional as F
from plain_forward import VOCABULARY, WIDTH, document, plain_nll, tiny_base

from megactx.evaluation.sums import loggable
from megactx.evaluation.validation import SpaceMetrics, ValidationMetrics
from megactx.gist import GistNet

K, H = 4, 20
SUBSTITUTION = {"blocks", "dnll", "dnll_drop", "kl", "recovery", "recovery_body", "substitutability", "ppl_ratio"}
SUBSTITUTION |= {"top1", "recovery_h0", "recovery_h1_3", "recovery_h4_15", "recovery_h16_up"}
BY_OFFSET = {"dnll_by_offset", "dnll_drop_by_offset"}
SPACE = {"diversity", "adjacent_distance", "contrastive_gap", "attention_entropy"}


@pytest.fixture(scope="module")
def base():
    return tiny_base()


def net(base, **settings) -> GistNet:
    torch.manual_seed(1)
    return GistNet(WIDTH, base.embedding_rms(), block_size=K, num_heads=4, skip="none", **settings)


def batches() -> list[dict]:
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(3, VOCABULARY, (48,), generator=generator) for _ in range(3)]
    return [document(ids, starts, domain, i) for i, (ids, starts, domain) in enumerate(
        zip(texts, ([4, 8, 24], [12], [20, 24]), ("code", "narrative", "code"), strict=True)
    )]  # fmt: skip


def fed(base, gistnet, data) -> dict:
    metrics = ValidationMetrics(H, WIDTH)
    for batch in data:
        metrics.update(base, gistnet, batch)
    return metrics.compute()


@pytest.mark.parametrize("pooling", ["mean", "query", "cls"])
def test_every_figure_of_the_dict_is_that_of_plain_forwards(base, pooling):
    gistnet = net(base, pooling=pooling)
    got = fed(base, gistnet, batches())
    expected = {
        f"{domain}{name}" for domain in ("", "code/", "narrative/") for name in SUBSTITUTION | BY_OFFSET | SPACE
    }
    assert set(got) == expected | {"cosine_std"}
    gistnet.eval()
    for prefix, domains in (("", {"code", "narrative"}), ("code/", {"code"})):
        dnll, cost, gists, distances, entropies = [], [], [], [], []
        for batch in batches():
            if batch["domain"][0] not in domains:
                continue
            ids = batch["ids"][0]
            for s in batch["block_starts"][0].tolist():
                own, right = (gistnet.encode_block(base.embed(ids[None, a : a + K]))[0].detach() for a in (s, s + K))
                full = plain_nll(base, ids, s, K, H, at=None)
                dnll.append(plain_nll(base, ids, s, K, H, own, K - 1) - full)
                cost.append(plain_nll(base, ids, s, K, H) - full)
                gists.append(own)
                distances.append(1 - F.cosine_similarity(own, right, dim=0))
                weights = gistnet.attention(base.embed(ids[None, s : s + K]))[0]
                entropies.append(-(weights * weights.log2()).sum(-1).mean())
        dnll, cost = torch.stack(dnll).double(), torch.stack(cost).double()
        pairs = [F.cosine_similarity(a, b, dim=0) for i, a in enumerate(gists) for b in gists[:i]]
        plain = {
            "blocks": torch.tensor(float(len(gists))),
            "dnll": dnll.mean(),
            "dnll_drop": cost.mean(),
            "ppl_ratio": dnll.mean().exp(),
            "recovery": 1 - dnll.sum() / cost.sum() if cost.mean() >= 0.01 else torch.tensor(torch.nan),
            "substitutability": (dnll.mean(1) < 1).double().mean(),
            "diversity": 1 - torch.stack(pairs).mean(),
            "adjacent_distance": torch.stack(distances).mean(),
            "attention_entropy": torch.stack(entropies).mean(),
        }
        for name, value in plain.items():
            value = pytest.approx(value.item(), rel=2e-3, abs=1e-5, nan_ok=True)
            assert got[prefix + name].item() == value, prefix + name
        torch.testing.assert_close(got[f"{prefix}dnll_by_offset"], dnll.mean(0), rtol=1e-3, atol=1e-4)


def test_what_is_logged_has_no_vector_and_nothing_undefined(base):
    got = fed(base, net(base, type="mean"), batches()[1:2])  # one block, and a net that attends nowhere
    assert got["diversity"].isnan() and got["attention_entropy"].isnan() and got["cosine_std"].isnan()
    logged = loggable(got)
    assert {"dnll", "narrative/dnll", "top1"} <= {*logged}
    assert not {"diversity", "attention_entropy", "dnll_by_offset"} & {*logged}
    assert all(value.ndim == 0 and value.isfinite() for value in logged.values())


def test_a_block_at_the_end_of_its_document_has_no_neighbour(base):
    data = batches()[0]
    data["block_starts"] = torch.tensor([[4, 44]])  # 48 tokens: the second has no horizon, but that is asked elsewhere
    metrics = SpaceMetrics(WIDTH)
    metrics.update(base, net(base), data)
    assert metrics.geometry.neighbours.sum() == 1 and metrics.geometry.blocks.sum() == 2
    data["block_starts"] = torch.tensor([[44]])
    metrics = SpaceMetrics(WIDTH)
    metrics.update(base, net(base), data)
    assert metrics.compute()["adjacent_distance"].isnan() and metrics.compute()["attention_entropy"] > 0


def test_padding_is_no_neighbour(base):
    data = batches()[0]
    data |= {"lengths": torch.tensor([46]), "block_starts": torch.tensor([[4, 40]])}
    metrics = SpaceMetrics(WIDTH)
    metrics.update(base, net(base), data)
    assert metrics.geometry.neighbours.sum() == 1


def test_a_batch_of_several_documents_equals_its_documents_one_by_one(base):
    first, _, third = batches()
    first["block_starts"] = first["block_starts"][:, :2]
    both = {name: torch.cat([first[name], third[name]]) for name in ("ids", "lengths", "block_starts", "document")}
    both["domain"] = first["domain"] + third["domain"]
    together, apart = fed(base, net(base), [both]), fed(base, net(base), [first, third])
    for name, value in apart.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_dropout_does_not_reach_a_validation_and_the_net_stays_in_training_mode(base):
    gistnet = net(base, dropout=0.5)
    one, two = fed(base, gistnet, batches()), fed(base, gistnet, batches())
    assert all(torch.equal(value, two[name]) or value.isnan().all() for name, value in one.items())
    assert gistnet.training
