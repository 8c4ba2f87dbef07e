"""History mode equals a fresh prefill of [sink, carriers, raw] per segment; a sliding mask over one pass does not."""

import pytest
import torch

from megactx.gist import GistNet
from megactx.gist.carrier import SoftTokens
from megactx.gist.carriers.avgpool import AvgPool
from megactx.gist.history import check_segments, continued, old_blocks, with_carriers, with_nothing
from megactx.gist.reading import read_carriers
from megactx.lm import masks
from megactx.lm.prefill import blocks, prefill

K, WIDTH, R, S = 8, 64, 16, 24
KINDS = ["llama", "qwen3", "smollm3", "nanochat"]


@pytest.fixture
def setting(make_base):
    def of(kind):
        base = make_base(kind)
        ids = torch.randint(3, 97, (2, 120))
        starts = torch.tensor([[32, 96, 56], [88, 40, 64]])
        return base, ids, starts, prefill(base, ids, with_states=True)

    return of


def gists(net, base, ids, starts):
    old = old_blocks(starts, K, R)
    return SoftTokens(net.encode_block(base.embed(blocks(ids, old, K)).flatten(0, 1)).view(*old.shape, -1), net.offset)


def fresh(base, rows, positions, keep):
    x, at = torch.cat(rows)[None], torch.cat(positions)[None]
    return base(x, at, masks.causal(x.shape[1]))[0, -keep:]


def plain(base, net, ids, start):
    """One segment on its own: a fresh prefill of the sink, the gists of the blocks in between, the raw tokens."""
    old = torch.arange(K, start - R, K)
    vectors = net.encode_block(torch.stack([base.embed(ids[None])[0, s : s + K] for s in old]))
    raw = torch.arange(start - R, start + S - 1)
    rows = [base.embed(ids[:K]), vectors, base.embed(ids[raw])]
    return fresh(base, rows, [torch.arange(K), old + net.offset, raw], S)


@pytest.mark.parametrize("position", ["centre", "end"])
@pytest.mark.parametrize("kind", KINDS)
def test_states_and_gradients_equal_a_fresh_prefill_per_segment(setting, kind, position):
    base, ids, starts, prefill = setting(kind)
    net = GistNet(WIDTH, base.embedding_rms(), block_size=K, skip="none", position=position)

    hidden = with_carriers(base, prefill, starts, gists(net, base, ids, starts), K, S, R)
    weights = torch.randn_like(hidden)
    (hidden * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()

    wanted = torch.stack([torch.stack([plain(base, net, ids[b], int(s)) for s in starts[b]]) for b in range(2)])
    (wanted * weights).sum().backward()
    torch.testing.assert_close(hidden, wanted, rtol=1e-4, atol=1e-4)
    for name, p in net.named_parameters():
        error = (gradients[name] - p.grad).norm() / p.grad.norm()
        assert error < 1e-4, f"gradient of {name} differs by {error:.1e}"


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_without_carriers_it_is_a_prefill_of_the_sink_and_the_raw_tokens(setting, kind):
    base, ids, starts, prefill = setting(kind)
    hidden = with_nothing(base, prefill, starts, K, S, R)
    for b, n in ((0, 1), (1, 0)):
        raw = torch.arange(int(starts[b, n]) - R, int(starts[b, n]) + S - 1)
        rows, positions = [base.embed(ids[b, :K]), base.embed(ids[b, raw])], [torch.arange(K), raw]
        torch.testing.assert_close(hidden[b, n], fresh(base, rows, positions, S), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_sliding_mask_over_one_pass_is_not_the_same(setting, kind):
    """The shortcut that the branches are there to avoid: raw rows computed once, each seeing the last R of them."""
    base, ids, starts, prefill = setting(kind)
    net = GistNet(WIDTH, base.embedding_rms(), block_size=K, skip="none")
    start = int(starts[0, 1])
    old = torch.arange(K, start - R, K)
    vectors = gists(net, base, ids[:1], torch.tensor([[start]])).vectors[0]
    raw = torch.arange(K, start + S - 1)
    x = torch.cat([base.embed(ids[0, :K]), vectors, base.embed(ids[0, raw])])[None]
    at = torch.cat([torch.arange(K), old + net.offset, raw])
    ends = torch.cat([torch.arange(K), old + K - 1, raw])  # the last token that each column stands for
    is_raw = torch.arange(len(at)) >= K + len(old)
    window = torch.where(is_raw, ends // K * K - R, 10**6)[:, None]  # where a row's raw columns begin
    sees = torch.where(is_raw, ends >= window, (ends < window) | (ends < K))
    one_pass = base(x, at[None], (sees & (ends <= ends[:, None]))[None, None])[0, -S:]
    wanted = plain(base, net, ids[0], start)
    assert not torch.allclose(one_pass, wanted, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_a_carrier_of_one_token_blocks_that_loses_nothing_gives_the_full_context(setting):
    """AvgPool with K = 1 keeps each token's own keys and values."""
    base, ids, starts, prefill = setting("llama")
    pool = AvgPool(block_size=1)
    hidden = with_carriers(base, prefill, starts, pool.compress(base, prefill, old_blocks(starts, 1, R)), 1, S, R)
    full = torch.stack([torch.stack([prefill.hidden[b, s - 1 : s - 1 + S] for s in starts[b]]) for b in range(2)])
    torch.testing.assert_close(hidden, full, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_and_other_segments_change_nothing(setting):
    base, ids, starts, read = setting("llama")
    net = GistNet(WIDTH, base.embedding_rms(), block_size=K, skip="none")
    both = with_carriers(base, read, starts, gists(net, base, ids, starts), K, S, R)
    for b in range(2):
        one = starts[b : b + 1, :1]
        short = prefill(base, ids[b : b + 1, : int(one) + S])
        alone = with_carriers(base, short, one, gists(net, base, short.ids, one), K, S, R)
        torch.testing.assert_close(both[b : b + 1, :1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("starts", "segment", "recency", "named"),
    [
        ([[36]], S, R, "segment start 36"),
        ([[24]], S, R, "segment start 24"),
        ([[104]], S, R, "segment start 104"),
        ([[64]], 20, R, "history.segment=20"),
        ([[64]], S, 12, "history.recency=12"),
        ([[64]], S, 0, "history.recency=0"),
    ],
)
def test_segments_that_do_not_fit_are_refused_by_name(starts, segment, recency, named):
    with pytest.raises(ValueError, match=named):
        check_segments(torch.tensor(starts), torch.tensor([120]), K, segment, recency)


@torch.no_grad()
def test_more_raw_tokens_than_the_window_are_the_same_pass_with_a_longer_window(setting):
    base, ids, starts, prefill = setting("llama")
    longer = with_nothing(base, prefill, starts, K, S, R + 8)
    columns = torch.full_like(starts, K)
    torch.testing.assert_close(longer, continued(base, prefill, starts, prefill.cache, columns, R + 8, S))
    assert (longer - with_nothing(base, prefill, starts, K, S, R)).abs().max() > 1e-3


def test_blocks_of_several_vectors_are_read_as_a_fresh_prefill_reads_them(setting):
    base, ids, starts, prefill = setting("llama")
    net = GistNet(WIDTH, base.embedding_rms(), block_size=K, slots=4)
    for p in net.parameters():
        p.data += 0.02 * torch.randn_like(p)
    hidden = with_carriers(base, prefill, starts, net.compress(base, prefill, old_blocks(starts, K, R)), K, S, R)
    for b in range(2):
        for n, start in enumerate(starts[b].tolist()):
            old = torch.arange(K, start - R, K)
            vectors = net.encode_block(torch.stack([base.embed(ids[b : b + 1])[0, s : s + K] for s in old.tolist()]))
            places = (old[:, None] + torch.tensor([1, 3, 5, 7])).flatten()
            raw = torch.arange(start - R, start + S - 1)
            rows = [base.embed(ids[b, :K]), vectors.flatten(0, 1), base.embed(ids[b, raw])]
            wanted = fresh(base, rows, [torch.arange(K), places, raw], S)
            torch.testing.assert_close(hidden[b, n], wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_carriers_of_one_two_and_four_vectors_are_read_side_by_side_as_alone(setting):
    base, _, starts, prefill = setting("llama")
    nets = [GistNet(WIDTH, base.embedding_rms(), block_size=K, slots=slots) for slots in (4, 1, 2)]
    each = [net.compress(base, prefill, starts) for net in nets]
    together = read_carriers(base, prefill, starts, each, K, 8)
    for found, carrier in zip(together, each, strict=True):
        torch.testing.assert_close(
            found, read_carriers(base, prefill, starts, [carrier], K, 8)[0], rtol=1e-4, atol=1e-5
        )
