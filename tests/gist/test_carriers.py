"""Carriers by keys and values: the field's unit checks (arXiv 2504.08934), and the packed pass against a plain one."""

import pytest
import torch
from transformers import DynamicCache

from megactx.gist.carrier import KVSlots
from megactx.gist.carriers.avgpool import AvgPool
from megactx.gist.carriers.gisting import Gisting
from megactx.gist.carriers.gistpool import GistPool
from megactx.gist.carriers.random_gist import RandomGist
from megactx.gist.substitution import slotted
from megactx.lm import masks
from megactx.lm.kv_hooks import keys_values, recorded
from megactx.lm.prefill import prefill, rows_at

K, WIDTH, H = 8, 64, 12
KINDS = ["llama", "qwen3", "smollm3", "nanochat"]


@pytest.fixture(params=KINDS)
def base(make_base, request):
    return make_base(request.param)


def documents(base):
    ids, starts = torch.randint(3, 97, (2, 100)), torch.tensor([[8, 72, 40], [48, 8, 16]])
    return ids, starts, prefill(base, ids, with_states=True)


def assert_same(one: KVSlots, other: KVSlots):
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_keys_and_values_of_the_recorded_inputs_are_those_that_the_model_caches(base):
    ids, _, prefill = documents(base)
    made = keys_values(base.model.get_decoder(), prefill.states[:-1], torch.arange(100).expand(2, -1))
    assert_same(KVSlots(made), KVSlots(prefill.cache))


@torch.no_grad()
def test_recorded_states_are_one_more_than_layers_and_end_before_the_final_norm(base):
    ids, _, prefill = documents(base)
    decoder = base.model.get_decoder()
    assert len(prefill.states) == len(decoder.layers) + 1
    torch.testing.assert_close(decoder.norm(prefill.states[-1]), prefill.hidden)
    with recorded(decoder) as states:
        pass
    base(base.embed(ids), None)
    assert not states, "nothing is recorded after the context is left"


@torch.no_grad()
def test_avgpool_of_one_token_blocks_is_the_uncompressed_model(base):
    ids, starts, prefill = documents(base)
    hidden = slotted(base, prefill, starts, AvgPool(block_size=1).compress(base, prefill, starts).layers, 1, H)
    torch.testing.assert_close(hidden, rows_at(prefill.hidden, starts + 1, H - 1), rtol=1e-4, atol=1e-4)


def forced_to_the_mean(pool, prefill, starts):
    """Layer by layer, the gist's state becomes the mean over its window of what goes into that layer of the base LM."""
    index = (starts[..., None] + torch.arange(K)).flatten(1)
    means = [
        states.gather(1, index[..., None].expand(-1, -1, WIDTH)).view(*starts.shape, K, WIDTH).mean(dim=2)
        for states in prefill.states[:-1]
    ]
    pool.summaries = lambda prefill, starts: [
        means[0],
        *means,
    ]  # g^l pools h^(l-1); g^0 is read by nobody but unshifted
    return pool


@torch.no_grad()
def test_gistpool_with_its_states_forced_to_the_mean_is_avgpool(base):
    ids, starts, prefill = documents(base)
    pool = forced_to_the_mean(GistPool(base, block_size=K, rank=2), prefill, starts)
    assert_same(pool.compress(base, prefill, starts), AvgPool(block_size=K).compress(base, prefill, starts))


@torch.no_grad()
def test_without_the_shift_it_is_not(base):
    ids, starts, prefill = documents(base)
    pool = forced_to_the_mean(Gisting(base, block_size=K, rank=2, window=True, shift=False), prefill, starts)
    mean = AvgPool(block_size=K).compress(base, prefill, starts)
    ours = pool.compress(base, prefill, starts)
    different = [(a - b).norm() / b.norm() for (a, _), (b, _) in zip(ours.layers, mean.layers, strict=True)]
    assert different[0] < 1e-4 < 1e-2 < min(different[2:]), "each layer but the first reads a state of one layer before"


@torch.no_grad()
def test_gisting_equals_a_model_that_really_reads_the_token_after_the_block(base):
    """Plain pass: the document up to the block's end, then the gist token; its own keys and values are the carrier."""
    ids, starts, prefill = documents(base)
    gisting = Gisting(base, block_size=K, position="end")
    made = gisting.compress(base, prefill, starts)
    for b, n in ((0, 1), (1, 2)):
        end = int(starts[b, n]) + K
        rows = torch.cat([base.embed(ids[b, :end]), gisting.token[None]])[None]
        positions = torch.cat([torch.arange(end), torch.tensor([end - 1])])[None]
        cache = DynamicCache()
        base(rows, positions, masks.causal(end + 1), cache)
        for (key, value), layer in zip(made.layers, cache.layers, strict=True):
            torch.testing.assert_close(key[b, :, n], layer.keys[0, :, -1], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(value[b, :, n], layer.values[0, :, -1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_window_keeps_what_comes_before_the_block_out_and_without_one_it_comes_in(base):
    ids, starts, read = documents(base)
    other = prefill(base, ids)
    changed = [tuple(part.clone() for part in layer) for layer in other.cache]
    for layer in changed:
        for part in layer:
            part[:, :, :8] += 1.0  # before the first block that is compressed
    other = type(other)(ids, other.hidden, tuple(changed))
    for window in (True, False):
        gisting = Gisting(base, block_size=K, rank=2, window=window)
        one, two = gisting.compress(base, read, starts), gisting.compress(base, other, starts)
        last = (one.layers[-1][0] - two.layers[-1][0]).abs().max()
        assert (last < 1e-6) == window


@torch.no_grad()
def test_the_packed_read_equals_a_plain_pass_over_prefix_slot_and_continuation(base):
    """Reference: a cache of the prefix with the slot appended at every layer, then the continuation, block by block."""
    ids, starts, prefill = documents(base)
    slots = AvgPool(block_size=K).compress(base, prefill, starts)
    hidden = slotted(base, prefill, starts, slots.layers, K, H)
    for b in range(2):
        for n in range(3):
            s = int(starts[b, n])
            cache = DynamicCache()
            for index, ((keys, values), (key, value)) in enumerate(zip(prefill.cache, slots.layers, strict=True)):
                cache.update(
                    torch.cat([keys[b : b + 1, :, :s], key[b : b + 1, :, n : n + 1]], dim=2),
                    torch.cat([values[b : b + 1, :, :s], value[b : b + 1, :, n : n + 1]], dim=2),
                    index,
                )
            positions = torch.arange(s + K, s + K + H - 1)[None]
            mask = torch.cat([torch.ones(H - 1, s + 1), torch.ones(H - 1, H - 1).tril()], dim=1).bool()[None, None]
            plain = base(base.embed(ids[b : b + 1, s + K : s + K + H - 1]), positions, mask, cache)
            torch.testing.assert_close(hidden[b, n], plain[0], rtol=1e-4, atol=1e-4)
    assert masks.branches(starts, 2, 5, slots=True).shape == (2, 1, 6, 5 + 3 + 6)


def test_only_the_token_and_the_adapters_are_parameters_and_the_reader_is_untouched(make_base):
    base = make_base()
    before = {name: p.clone() for name, p in base.named_parameters()}
    modules = [type(module).__name__ for module in base.modules()]
    pool = GistPool(base, block_size=K, rank=2)
    ids, starts, prefill = documents(base)
    names = {name.split(".")[0] for name, _ in pool.named_parameters()}
    assert names == {"token", "adapters"} and all(p.requires_grad for p in pool.parameters())
    slots = pool.compress(base, prefill, starts)
    slotted(base, prefill, starts, slots.layers, K, H).pow(2).sum().backward()
    # LoRA's second matrix starts at zero, so its first one has no gradient yet.
    assert pool.token.grad.abs().sum() > 0
    assert [type(module).__name__ for module in base.modules()] == modules, "no adapter in the reading model"
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in base.named_parameters())
    assert not any(p.requires_grad for p in base.parameters())


def test_every_adapter_learns_once_its_second_matrix_is_not_zero(make_base):
    base = make_base()
    pool = GistPool(base, block_size=K, rank=2)
    with torch.no_grad():
        for p in pool.adapters.parameters():
            p.normal_(std=0.1)
    ids, starts, prefill = documents(base)
    slotted(base, prefill, starts, pool.compress(base, prefill, starts).layers, K, H).pow(2).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in pool.parameters())


def test_adapters_follow_a_cast_of_the_base_and_stay_in_fp32(make_base):
    base = make_base()
    pool = GistPool(base, block_size=K, rank=2)
    base.to(torch.bfloat16)
    assert {p.dtype for p in pool.parameters()} == {torch.float32}
    (twin,) = pool._twin
    assert twin.model.get_input_embeddings().weight is base.model.get_input_embeddings().weight
    with torch.autocast("cpu", torch.bfloat16):
        ids, starts, prefill = documents(base)
        slots = pool.compress(base, prefill, starts)
        hidden = slotted(base, prefill, starts, slots.layers, K, H)
    assert hidden.dtype == torch.bfloat16 and torch.isfinite(hidden).all()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (dict(position="middle"), "compressor.position=middle"),
        (dict(block_size=0), "block_size=0"),
        (dict(rank=-1), "compressor.rank=-1"),
    ],
)
def test_settings_that_are_not_allowed_are_refused_by_name(make_base, settings, named):
    with pytest.raises(ValueError, match=named):
        Gisting(make_base(), **settings)


def test_a_horizon_of_one_token_cannot_be_scored(make_base):
    base = make_base()
    ids, starts, prefill = documents(base)
    with pytest.raises(ValueError, match="horizon.tokens=1"):
        slotted(base, prefill, starts, AvgPool(K).compress(base, prefill, starts).layers, K, 1)


def test_noise_in_place_of_a_gist_is_that_of_its_document_whatever_stands_before_it_in_the_batch(make_base):
    base, noise = make_base(), RandomGist(0.5, block_size=4)
    ids, starts = torch.randint(3, 60, (3, 40)), torch.tensor([[4, 12], [8, 20], [4, 16]])
    together = noise.compress(base, prefill(base, ids), starts).vectors
    for row in range(3):
        alone = noise.compress(base, prefill(base, ids[row : row + 1]), starts[row : row + 1]).vectors
        torch.testing.assert_close(together[row : row + 1], alone)
    assert not torch.equal(together[0], together[1])
