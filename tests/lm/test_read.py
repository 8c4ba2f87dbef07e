"""A working context is read as the tokens and gists that it holds, at the positions that they have."""

import pytest
import torch
from small_base import FAMILIES, small

from megactx.lm import masks


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_context_of_tokens_only_equals_the_plain_model(kind):
    base, ids = small(kind), torch.randint(3, 97, (2, 40))
    positions = torch.arange(40).expand(2, -1)
    hidden = base.read(base.embed(ids), positions, torch.tensor([40, 40]))
    decoder = base.model.get_decoder()
    additive = masks.additive(masks.causal(40), torch.float32)
    same = decoder(input_ids=ids, position_ids=positions, attention_mask=additive).last_hidden_state
    assert torch.equal(hidden, same), "not bit for bit with the same explicit mask"
    unmasked = decoder(input_ids=ids).last_hidden_state
    torch.testing.assert_close(hidden, unmasked, rtol=1e-5, atol=1e-5)
    wide = base.read(base.embed(ids), positions, torch.tensor([40, 40]), torch.zeros(2, 40))
    assert torch.equal(wide, hidden), "tokens with sigma 0 are not read as tokens"


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_contexts_of_different_lengths_are_read_as_each_is_alone_whatever_the_padding_holds(kind):
    base, lengths = small(kind), torch.tensor([30, 11, 1])
    x, sigma = torch.randn(3, 30, 64), torch.rand(3, 30) * 9
    positions = (torch.randint(1, 9, (3, 30))).cumsum(dim=1)  # jumps
    for row, length in enumerate(lengths.tolist()):
        x[row, length:], positions[row, length:], sigma[row, length:] = torch.nan, 10**6, torch.inf
    together = base.read(x, positions, lengths, sigma)
    for row, length in enumerate(lengths.tolist()):
        parts = x[row : row + 1, :length], positions[row : row + 1, :length], torch.tensor([length])
        alone = base.read(*parts, sigma[row : row + 1, :length])
        torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-5, atol=1e-5)
        assert (together[row, length:] == 0).all()


@torch.no_grad()
def test_entries_are_read_across_a_jump_and_from_where_they_are():
    base, x = small("llama"), torch.randn(1, 20, 64)
    positions = torch.arange(20)[None].clone()
    positions[:, 10:] += 31
    length = torch.tensor([20])
    hidden = base.read(x, positions, length)
    changed = x.clone()
    changed[0, 3] += 1
    assert (base.read(changed, positions, length)[0, -1] - hidden[0, -1]).abs().max() > 1e-4, "cut at the jump"
    assert (base.read(x, torch.arange(20)[None], length)[0, -1] - hidden[0, -1]).abs().max() > 1e-5
    torch.testing.assert_close(base.read(x, positions + 100, length), hidden, rtol=1e-3, atol=1e-4)  # RoPE is relative


@torch.no_grad()
def test_a_gist_in_a_context_is_what_the_packed_pass_replaces_a_block_by():
    from megactx.gist.substitution import substituted
    from megactx.lm.prefill import prefill

    base, start, block, horizon = small("qwen3"), 16, 8, 6
    ids, gist, sigma = torch.randint(3, 97, (1, 40)), torch.randn(1, 1, 1, 64), torch.tensor(2.3)
    packed = substituted(base, prefill(base, ids), torch.tensor([[start]]), gist, [7], block, horizon, [sigma])
    tokens = base.embed(ids)
    x = torch.cat([tokens[:, :start], gist[0], tokens[:, start + block : start + block + horizon - 1]], dim=1)
    positions = torch.cat([torch.arange(start), torch.tensor([start + 7]), torch.arange(24, 24 + horizon - 1)])
    wide = torch.where(torch.arange(x.shape[1]) == start, sigma, 0.0)[None]
    hidden = base.read(x, positions[None], torch.tensor([x.shape[1]]), wide)
    torch.testing.assert_close(hidden[0, start:], packed[0, 0, 0], rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_entries_and_none_comes_from_the_padding():
    base, x = small("llama"), torch.randn(2, 9, 64, requires_grad=True)
    base.read(x, torch.arange(9).expand(2, -1), torch.tensor([9, 4]))[..., :8].square().sum().backward()
    assert (x.grad[0].abs().sum(dim=-1) > 0).all() and (x.grad[1, 4:] == 0).all()


@pytest.mark.parametrize("name", ["positions", "lengths", "sigma"])
def test_shapes_that_do_not_belong_together_are_refused(name):
    given = {"positions": torch.zeros(2, 5), "lengths": torch.ones(2), "sigma": torch.zeros(2, 5)}
    given[name] = given[name][:1]
    with pytest.raises(ValueError, match=f"working context: {name} has shape"):
        small("llama").read(torch.zeros(2, 5, 64), **given)
