"""The packed pass with spans of K^2 tokens, and with several vectors in place of one, equals plain forwards."""

import pytest
import torch
from small_base import WIDTH, small

from megactx.gist import GistNet
from megactx.gist.substitution import substituted
from megactx.lm.prefill import blocks, prefill


@pytest.mark.parametrize("mode", ["plain", "learned"])
@pytest.mark.parametrize("kind", ["llama", "smollm3", "nanochat"])
def test_loss_and_gradients_of_gists_of_gists_equal_plain_forwards(kind, mode):
    """A span of K^2 tokens is one gist of K gists; both levels train the same weights."""
    base, k, horizon = small(kind), 4, 5
    torch.manual_seed(1)
    net = GistNet(WIDTH, base.embedding_rms(), block_size=k, skip="none", position="end", gaussian_rope=mode)
    ids, starts, span = torch.randint(3, 97, (1, 60)), torch.tensor([[16, 32]]), k**2
    read = prefill(base, ids)
    gists = net.encode_lod(base.embed(blocks(ids, starts, span)).flatten(0, 1), 2).view(1, 1, 2, WIDTH)
    hidden = substituted(base, read, starts, gists, [net.offset_in(span)], span, horizon, [net.sigma(2)])
    (hidden.square() * torch.linspace(0, 1, WIDTH)).mean().backward()  # the mean alone is that of the final norm
    gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()

    plain = []
    for s in starts[0].tolist():
        below = [net.encode_block(base.embed(ids[:, a : a + k])) for a in range(s, s + span, k)]
        gist = net.encode_block(torch.stack(below, dim=1))
        x = torch.cat([base.embed(ids[:, :s]), gist[:, None], base.embed(ids[:, s + span : s + span + 4])], dim=1)
        positions = torch.cat([torch.arange(s), torch.arange(s + span - 1, s + span + 4)])[None]
        sigma = net.sigma(2)
        wide = None if sigma is None else torch.where(torch.arange(x.shape[1]) == s, sigma, 0.0)[None]
        plain.append(base.read(x, positions, torch.tensor([x.shape[1]]), wide)[0, s:])
    plain = torch.stack(plain)
    torch.testing.assert_close(hidden[0, 0], plain, rtol=1e-4, atol=1e-5)
    (plain.square() * torch.linspace(0, 1, WIDTH)).mean().backward()
    for name, p in net.named_parameters():
        error = (gradients[name] - p.grad).norm() / p.grad.norm()
        assert error < 1e-4, f"gradient of {name} differs by {error:.1e}"


@torch.no_grad()
@pytest.mark.parametrize("horizon", [1, 6])
def test_several_gists_in_place_of_one_span_equal_a_plain_forward_and_the_last_predicts_the_first_token(horizon):
    base, span, start = small("qwen3"), 16, 32
    ids, vectors, offsets, sigma = torch.randint(3, 97, (1, 60)), torch.randn(2, 1, 1, 4, WIDTH), [3, 7, 11, 15], 1.2
    starts, sigmas = torch.tensor([[start]]), [None, torch.tensor(sigma)]
    hidden = substituted(base, prefill(base, ids), starts, vectors, [offsets, offsets], span, horizon, sigmas)
    assert hidden.shape == (2, 1, 1, horizon, WIDTH)
    after = torch.arange(start + span, start + span + horizon - 1)
    positions = torch.cat([torch.arange(start), start + torch.tensor(offsets), after])[None]
    for carrier, width in enumerate((0.0, sigma)):
        x = torch.cat([base.embed(ids[:, :start]), vectors[carrier, 0], base.embed(ids[:, after])], dim=1)
        row = torch.arange(x.shape[1])
        wide = torch.where((row >= start) & (row < start + 4), width, 0.0)[None]
        plain = base.read(x, positions, torch.tensor([x.shape[1]]), wide)[0, -horizon:]
        torch.testing.assert_close(hidden[carrier, 0, 0], plain, rtol=1e-4, atol=1e-5)
