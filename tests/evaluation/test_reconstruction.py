import math

import pytest
import torch
from plain_forward import VOCABULARY, WIDTH, document, tiny_base

from megactx.evaluation.reconstruction import Decoder, ReconstructionMetrics, reconstruction, train_decoder
from megactx.gist import GistNet

K = 4


@pytest.fixture(scope="module")
def base():
    return tiny_base()


def net(base, **settings) -> GistNet:
    torch.manual_seed(1)
    return GistNet(WIDTH, base.embedding_rms(), block_size=K, **{"num_heads": 4, "skip": "none", **settings})


def batches(count=3, seed=0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(3, VOCABULARY, (40,), generator=generator) for _ in range(count)]
    return [document(ids, [4, 8, 24, 32], "code" if i % 2 else "narrative", i) for i, ids in enumerate(texts)]


def test_figures_equal_a_plain_computation_overall_and_per_domain():
    generator = torch.Generator().manual_seed(0)
    logits, tokens = torch.randn(5, K, 7, generator=generator), torch.randint(0, 7, (5, K), generator=generator)
    logits[0, 0, tokens[0, 0]] = 9
    domain = ["code", "narrative", "code", "code", "narrative"]
    metric = ReconstructionMetrics()
    metric.update(logits[:2], tokens[:2], domain[:2])
    metric.update(logits[2:], tokens[2:], domain[2:])
    got = metric.compute()
    for prefix, blocks in (("", range(5)), ("code/", [0, 2, 3])):
        nll, right = [], []
        for m in blocks:
            for k in range(K):
                row, token = logits[m, k].tolist(), int(tokens[m, k])
                nll.append(math.log(sum(math.exp(x) for x in row)) - row[token])
                right.append(row.index(max(row)) == token)
        assert got[f"{prefix}reconstruction_nll"].item() == pytest.approx(sum(nll) / len(nll), rel=1e-5)
        assert got[f"{prefix}reconstruction_top1"].item() == pytest.approx(sum(right) / len(right))


def test_training_teaches_the_decoder_and_nothing_reaches_the_gistnet_or_the_base(base):
    gistnet = net(base, dropout=0.3)
    before = {name: p.clone() for name, p in gistnet.state_dict().items()}
    state = torch.get_rng_state()
    held = batches()
    fresh = reconstruction(base, gistnet, train_decoder(base, gistnet, []), held)
    trained = reconstruction(base, gistnet, train_decoder(base, gistnet, held * 60, lr=5e-3), held)
    assert trained["reconstruction_nll"] < 0.5 * fresh["reconstruction_nll"]
    assert trained["reconstruction_top1"] > fresh["reconstruction_top1"] + 0.3
    assert {"code/reconstruction_nll", "narrative/reconstruction_top1"} <= {*trained}
    assert all(p.grad is None for module in (base, gistnet) for p in module.parameters())
    assert all(torch.equal(p, before[name]) for name, p in gistnet.state_dict().items()) and gistnet.training
    assert torch.equal(torch.get_rng_state(), state), "it drew from the generator that training goes on with"


def test_training_works_within_inference_mode_where_a_run_ends_and_is_seeded(base):
    with torch.inference_mode():
        one, two = (train_decoder(base, net(base), batches(), seed=3) for _ in range(2))
        held = reconstruction(base, net(base), one, batches(seed=1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert math.isfinite(held["reconstruction_nll"])


def test_a_net_without_a_backbone_is_read_too(base):
    gistnet = net(base, type="mean")
    assert reconstruction(base, gistnet, train_decoder(base, gistnet, batches()), batches())["reconstruction_nll"] > 0


def test_the_decoder_sees_the_gist_and_tells_positions_apart():
    torch.manual_seed(0)
    decoder, table = Decoder(WIDTH, K, 0.05), torch.randn(VOCABULARY, WIDTH) * 0.05
    gists = torch.randn(3, WIDTH) * 0.05
    logits = decoder(gists, table)
    assert logits.shape == (3, K, VOCABULARY)
    assert (logits[0] - logits[1]).abs().max() > 1e-3 and (logits[0, 0] - logits[0, 1]).abs().max() > 1e-3


def test_many_blocks_are_decoded_in_parts_with_the_same_figures(base, monkeypatch):
    gistnet = net(base)
    decoder = train_decoder(base, gistnet, batches())
    whole = reconstruction(base, gistnet, decoder, batches())
    monkeypatch.setattr("megactx.evaluation.reconstruction.AT_ONCE", 3)
    assert reconstruction(base, gistnet, decoder, batches()) == pytest.approx(whole, rel=1e-5)


def test_a_loss_that_is_not_finite_is_refused(base):
    gistnet = net(base)
    gistnet.gain.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="reconstruction decoder's loss is nan"):
        train_decoder(base, gistnet, batches())
