"""Stored gists are those of the base LM as it was; fresh ones follow it; without a change both are the same."""

import pytest
import torch
from small_base import WIDTH, small
from transformers import DynamicCache

from megactx.gist import GistNet
from megactx.gist.carriers.avgpool import AvgPool
from megactx.gist.carriers.gistpool import GistPool
from megactx.lm import masks
from megactx.lm.prefill import prefill
from megactx.studies import drift
from megactx.studies.drift import changed, keys_of, measure_drift, parsed

K, H, T = 8, 6, 64


def sharp():
    base = small()
    for p in base.parameters():
        p.data *= 2.5  # a random base is indifferent to what it reads
    return base


def gistnet(base, **settings):
    torch.manual_seed(1)
    return GistNet(WIDTH, base.embedding_rms(), K, num_heads=4, skip="none", **settings)


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "ids": torch.randint(3, 97, (1, T), generator=generator),
            "lengths": torch.tensor([T]),
            "block_starts": torch.tensor([[K, 3 * K, 5 * K]]),
            "domain": ["code"],
            "document": torch.tensor([index]),
        }
        for index in range(4)
    ]


def state(base):
    return {name: value.clone() for name, value in base.state_dict().items()}


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def test_noise_has_the_size_that_was_asked_for_and_is_gone_afterwards():
    base = sharp()
    before = state(base)
    with changed(base, "0.05"):
        for name, value in base.state_dict().items():
            if value.ndim > 1:
                assert ((value - before[name]).norm() / before[name].norm()).item() == pytest.approx(0.05, rel=1e-3)
            else:
                assert torch.equal(value, before[name]), "norms are left alone"
    assert same(state(base), before)


def test_training_steps_change_the_base_which_is_frozen_and_whole_afterwards(monkeypatch):
    base = sharp()
    before = state(base)
    monkeypatch.setattr(drift, "_windows", lambda base, steps, seed: [torch.arange(3, 35)[None]] * steps)
    with changed(base, "steps=2"):
        assert not same(state(base), before)
        assert not base.training and not any(p.requires_grad for p in base.parameters())
    assert same(state(base), before)


def test_another_base_takes_its_place_where_it_has_the_same_architecture(tmp_path, tiny_tokenizer):
    torch.manual_seed(3)
    base, other, wider = (small(vocab_size=512, **more) for more in ({}, {}, {"intermediate_size": 100}))
    for p in other.parameters():
        p.data += 0.01
    for name, made in (("other", other), ("wider", wider)):
        made.model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    with changed(base, str(tmp_path / "other")):
        assert same(state(base), state(other))
    with pytest.raises(ValueError, match="another architecture"), changed(base, str(tmp_path / "wider")):
        pass


@pytest.mark.parametrize(
    ("change", "named"),
    [("0", "above 0"), ("inf", "above 0"), ("steps=0", "from 1"), ("steps=x", "from 1"), ("no-such", "relative size")],
)
def test_a_change_that_cannot_be_read_is_refused(change, named):
    with pytest.raises(ValueError, match=f"--drift={change} is not allowed.*{named}"):
        parsed(change)


@torch.no_grad()
@pytest.mark.parametrize("gaussian_rope", ["plain", "damped"])
def test_the_keys_of_a_vector_are_those_of_a_plain_pass(batches, gaussian_rope):
    base = sharp()
    net, batch = gistnet(base, gaussian_rope=gaussian_rope), batches[0]
    read = prefill(base, batch["ids"])
    carriers = net.compress(base, read, batch["block_starts"])
    slots = keys_of(base, read, batch["block_starts"], carriers)
    for n, start in enumerate(batch["block_starts"][0].tolist()):
        cache, rows = (
            DynamicCache(),
            torch.cat([base.embed(batch["ids"][:, :start]), carriers.vectors[:, n : n + 1]], 1),
        )
        at = torch.cat([torch.arange(start), torch.tensor([start + carriers.offset])])[None]
        sigma = None
        if carriers.sigma is not None:
            sigma = torch.cat([torch.zeros(1, start), carriers.sigma.view(1, 1)], 1)
        base(rows, at, masks.causal(start + 1), cache, sigma)
        for layer, (keys, values) in zip(cache.layers, slots.layers, strict=True):
            torch.testing.assert_close(keys[:, :, n], layer.keys[:, :, -1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(values[:, :, n], layer.values[:, :, -1], rtol=1e-4, atol=1e-4)


def test_stored_and_fresh_agree_until_the_base_changes(batches):
    base = sharp()
    nets = {"gistnet": gistnet(base), "gistpool": GistPool(base, K, rank=2), "avgpool": AvgPool(K)}
    table = measure_drift(base, nets, ["0.2"], batches, H)
    stored = ["gistnet, vectors", "gistnet, keys and values", "gistpool, keys and values", "avgpool, keys and values"]
    assert table.names("run") == ["none", "0.2"] and table.names("carrier") == stored
    for change in ("none", "0.2"):
        for carrier in stored:
            fresh, kept, lost = (table.point(run=change, carrier=carrier, metric=m) for m in ("fresh", "kept", "lost"))
            assert lost == pytest.approx(fresh - kept, abs=1e-6)
            assert abs(lost) < 1e-4 if change == "none" else abs(lost) > 1e-4
