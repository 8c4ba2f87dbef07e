"""Exact recall over gists, over gists with one block expanded, over the full context: each equals a plain prefill."""

import numpy as np
import pytest
import torch

from megactx.data.probes import Probe
from megactx.evaluation.probes import READERS, measure_probes
from megactx.gist import GistNet
from megactx.gist.carriers.avgpool import AvgPool
from megactx.lm import BaseLM, masks

K, R, M, WIDTH = 8, 16, 4, 32


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    config = dict(model_type="llama", vocab_size=97, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2)
    base = BaseLM.from_config({**config, "num_attention_heads": 2, "max_position_embeddings": 256}).freeze()
    for p in base.parameters():
        p.data *= 2  # a random base is indifferent to what it reads
    return base


def probes(*places):
    rng, asked = np.random.default_rng(1), (M + 1) * K + R
    places = places or ((K, 1), (3 * K, 1), (M * K, 1), (2 * K, 2))  # start, blocks
    ids = [rng.integers(3, 97, size=asked + 3) for _ in places]
    return [Probe("number", x, told, asked, "?", blocks) for x, (told, blocks) in zip(ids, places, strict=True)]


def plain_nll(base, probe, rows, positions):
    """NLL of the answer behind a fresh prefill of some rows and of the recent raw tokens."""
    ids = torch.from_numpy(probe.ids)
    raw = torch.arange(probe.asked - R, len(ids) - 1)
    x, at = torch.cat([*rows, base.embed(ids[raw])])[None], torch.cat([*positions, raw])[None]
    hidden = base(x, at, masks.causal(x.shape[1]))[0, -probe.length :]
    return torch.nn.functional.cross_entropy(base.logits(hidden), ids[probe.asked :])


@torch.no_grad()
@pytest.mark.parametrize("gaussian_rope", ["plain", "damped"])
def test_each_reader_equals_a_plain_prefill_of_what_it_sees(base, gaussian_rope):
    torch.manual_seed(1)
    net = GistNet(WIDTH, base.embedding_rms(), block_size=K, num_heads=4, skip="none", gaussian_rope=gaussian_rope)
    for probe, row in zip(probes(), measure_probes(base, net, probes(), R), strict=True):
        ids = torch.from_numpy(probe.ids)
        full = base.logits(base(base.embed(ids[None]), None))[0, probe.asked - 1 : -1]
        nll = torch.nn.functional.cross_entropy(full, ids[probe.asked :])
        assert row["full context"]["nll"] == pytest.approx(nll.item(), rel=1e-4)
        if gaussian_rope == "damped":  # the plain prefill below has points for positions
            continue
        old = torch.arange(K, probe.asked - R, K)
        gists = net.encode_block(torch.stack([base.embed(ids[s : s + K]) for s in old]))
        sink = (base.embed(ids[:K]), torch.arange(K))
        only = plain_nll(base, probe, [sink[0], gists], [sink[1], old + net.offset])
        assert row["gists only"]["nll"] == pytest.approx(only.item(), rel=1e-4)
        told, index = torch.arange(probe.told, probe.told + probe.blocks * K), probe.told // K - 1
        behind = index + probe.blocks
        rows = [sink[0], gists[:index], base.embed(ids[told]), gists[behind:]]
        places = [sink[1], (old + net.offset)[:index], told, (old + net.offset)[behind:]]
        expanded = plain_nll(base, probe, rows, places)
        assert row["block expanded"]["nll"] == pytest.approx(expanded.item(), rel=1e-4)


def test_a_carrier_that_loses_nothing_answers_as_the_full_context_does(base):
    """AvgPool with K = 1: each token's own keys and values."""
    for row in measure_probes(base, AvgPool(block_size=1), probes((K, 1), (3 * K, 1), (2 * K, 2 * K)), R):
        for reader in READERS:
            assert row[reader]["nll"] == pytest.approx(row["full context"]["nll"], rel=1e-4)
            assert row[reader]["right"] == row["full context"]["right"]
