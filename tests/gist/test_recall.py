"""Recall behind a mixed context equals a fresh prefill per case, with one block in tokens and all others as gists."""

import pytest
import torch

from megactx.gist import GistNet
from megactx.gist.carrier import SoftTokens
from megactx.gist.history import old_blocks
from megactx.gist.recall import full, mixed
from megactx.lm.prefill import blocks, prefill

K, WIDTH, R = 8, 64, 16


@pytest.fixture
def setting(make_base):
    def of(kind):
        base = make_base(kind)
        ids = torch.randint(3, 97, (2, 120))
        starts, copied_blocks = torch.tensor([[32, 96, 56], [88, 40, 64]]), torch.tensor([[8, 72, 24], [8, 16, 40]])
        return base, ids, starts, copied_blocks, prefill(base, ids)

    return of


def plain(base, net, ids, start, copied_blocks):
    """One case on its own: sink, gists, the told block's tokens among them, raw tokens, the block again."""
    embedded, sigma = base.embed(ids[None])[0], net.sigma(1)
    rows, at, wide = [embedded[:K]], [torch.arange(K)], [torch.zeros(K)]
    for s in range(K, start - R, K):
        if s == copied_blocks:
            rows, at, wide = [*rows, embedded[s : s + K]], [*at, torch.arange(s, s + K)], [*wide, torch.zeros(K)]
            continue
        rows.append(net.encode_block(embedded[None, s : s + K]))
        at.append(torch.tensor([s + net.offset]))
        wide.append(torch.zeros(1) if sigma is None else sigma[None])
    rows += [embedded[start - R : start], embedded[copied_blocks : copied_blocks + K - 1]]
    at.append(torch.arange(start - R, start + K - 1))
    wide.append(torch.zeros(R + K - 1))
    x = torch.cat(rows)[None]
    spread = None if sigma is None else torch.cat(wide)[None]
    return base.read(x, torch.cat(at)[None], torch.tensor([x.shape[1]]), spread)[0, -K:]


@pytest.mark.parametrize("gaussian_rope", ["plain", "learned"])
@pytest.mark.parametrize("position", ["centre", "end"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "nanochat"])
def test_states_and_gradients_equal_a_fresh_prefill_per_case(setting, kind, position, gaussian_rope):
    base, ids, starts, copied_blocks, prefill = setting(kind)
    net = GistNet(
        WIDTH, base.embedding_rms(), block_size=K, skip="none", position=position, gaussian_rope=gaussian_rope
    )
    old = old_blocks(starts, K, R)

    hidden = mixed(base, prefill, starts, copied_blocks, old, net.compress(base, prefill, old), K, R)
    weights = torch.randn_like(hidden)
    (hidden * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()

    cases = [
        [plain(base, net, ids[b], int(starts[b, n]), int(copied_blocks[b, n])) for n in range(3)] for b in range(2)
    ]
    wanted = torch.stack([torch.stack(row) for row in cases])
    (wanted * weights).sum().backward()
    torch.testing.assert_close(hidden, wanted, rtol=1e-4, atol=1e-4)
    assert len(gradients) == sum(p.grad is not None for p in net.parameters()) > 0
    for name, p in net.named_parameters():
        if p.grad is not None:
            error = (gradients[name] - p.grad).norm() / p.grad.norm()
            assert error < 1e-4, f"gradient of {name} differs by {error:.1e}"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3", "nanochat"])
def test_the_full_context_is_the_document_followed_by_the_block(setting, kind):
    base, ids, starts, copied_blocks, read = setting(kind)
    hidden = full(base, read, starts, copied_blocks, K)
    for b, n in ((0, 1), (1, 0), (1, 2)):
        start, block = int(starts[b, n]), int(copied_blocks[b, n])
        again = torch.cat([ids[b, :start], ids[b, block : block + K]])[None]
        torch.testing.assert_close(hidden[b, n], prefill(base, again).hidden[0, start - 1 : -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_where_the_only_old_block_is_in_tokens_nothing_is_lost(setting):
    base, ids, _, _, prefill = setting("llama")
    starts, copied_blocks = torch.full((2, 1), 2 * K + R), torch.full((2, 1), K)
    old = old_blocks(starts, K, R)
    nonsense = SoftTokens(torch.full((2, 1, WIDTH), torch.nan), K - 1)
    hidden = mixed(base, prefill, starts, copied_blocks, old, nonsense, K, R)
    torch.testing.assert_close(hidden, full(base, prefill, starts, copied_blocks, K), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_case_is_the_same_alone_and_beside_longer_ones(setting):
    base, ids, starts, copied_blocks, read = setting("llama")
    net = GistNet(WIDTH, base.embedding_rms(), block_size=K, skip="none")
    old = old_blocks(starts, K, R)
    together = mixed(base, read, starts, copied_blocks, old, net.compress(base, read, old), K, R)
    for b, n in ((0, 0), (1, 1)):
        one, block = starts[b : b + 1, n : n + 1], copied_blocks[b : b + 1, n : n + 1]
        own = prefill(base, ids[b : b + 1, : int(one)])
        few = old_blocks(one, K, R)
        alone = mixed(base, own, one, block, few, net.compress(base, own, few), K, R)
        torch.testing.assert_close(together[b : b + 1, n : n + 1], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            full(base, read, starts, copied_blocks, K)[b : b + 1, n : n + 1], full(base, own, one, block, K)
        )


@torch.no_grad()
def test_blocks_of_one_token_come_back_as_one_token(setting):
    base, ids, _, _, prefill = setting("llama")
    starts, copied_blocks = torch.tensor([[20], [30]]), torch.tensor([[3], [5]])
    old = old_blocks(starts, 1, R)
    raw = SoftTokens(base.embed(blocks(ids, old, 1)).flatten(2), 0)  # each carrier is its token: nothing is compressed
    hidden = mixed(base, prefill, starts, copied_blocks, old, raw, 1, R)
    torch.testing.assert_close(hidden, full(base, prefill, starts, copied_blocks, 1), rtol=1e-4, atol=1e-4)
