"""GistNets that read more than their block: tokens to its left, or the base LM's own states of it."""

import pytest
import torch

from megactx.gist import GistNet
from megactx.lm.prefill import prefill, unread
from megactx.memory import MegaContextTree

K, WIDTH = 8, 64


def net(base, **settings):
    torch.manual_seed(1)
    net = GistNet(WIDTH, base.embedding_rms(), block_size=K, **settings).eval()
    for p in net.parameters():  # a fresh correction is zero: nothing that it sees would show
        p.data += 0.05 * torch.randn_like(p)
    return net


@pytest.fixture(scope="module")
def base(make_base):
    return make_base()


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(2)
    return torch.randint(3, 97, (2, 160))


def changed(ids, at):
    other = ids.clone()
    other[:, at] = (other[:, at] - 3 + 1) % 94 + 3
    return other


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "query", "cls"])
def test_the_context_reaches_the_gist_as_far_as_it_goes_and_nothing_behind_the_block_does(base, ids, pooling):
    encoder, starts = net(base, context=16, pooling=pooling), torch.tensor([[40], [40]])

    def gist(ids):
        return encoder.compress(base, unread(ids), starts).vectors

    mine = gist(ids)
    for at, reaches in ((23, False), (24, True), (39, True), (47, True), (48, False)):
        assert (
            (gist(changed(ids, at)) - mine).abs().max() > 1e-6 if reaches else torch.equal(gist(changed(ids, at)), mine)
        )


@torch.no_grad()
def test_where_the_document_has_not_begun_there_is_nothing_to_see(base, ids):
    """The block at K has K tokens to its left: with a context of 2 K it is as with a context of K."""
    starts = torch.tensor([[K], [K]])
    wide, narrow = net(base, context=2 * K), net(base, context=K)
    narrow.load_state_dict(wide.state_dict())
    one, two = (encoder.compress(base, unread(ids), starts).vectors for encoder in (wide, narrow))
    torch.testing.assert_close(one, two)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "query", "cls"])
def test_without_context_what_is_seen_is_the_block(base, ids, pooling):
    encoder, starts = net(base, pooling=pooling), torch.tensor([[16, 40], [K, 80]])
    plain = encoder.encode_block(torch.stack([base.embed(ids[b, s : s + K]) for b in range(2) for s in starts[b]]))
    torch.testing.assert_close(encoder.compress(base, unread(ids), starts).vectors.flatten(0, 1), plain)


@torch.no_grad()
def test_hidden_states_bring_the_whole_prefix_and_the_layer_is_the_one_that_was_asked_for(base, ids):
    starts = torch.tensor([[80], [80]])
    gists = []
    for layer in (0, 2):
        encoder = net(base, input="hidden", input_layer=layer)
        one, two = (
            encoder.compress(base, prefill(base, x, with_states=True), starts).vectors for x in (ids, changed(ids, 3))
        )
        assert torch.equal(one, two) == (layer == 0), "the embeddings have read nothing yet"
        gists.append(one)
    assert (gists[0] - gists[1]).abs().max() > 1e-6


def test_a_layer_that_the_base_does_not_have_is_refused_by_name(base, ids):
    encoder = net(base, input="hidden", input_layer=5)
    with pytest.raises(ValueError, match=r"gistnet.input_layer=5 is not allowed: 0 to 4"):
        encoder.compress(base, prefill(base, ids, with_states=True), torch.tensor([[80], [80]]))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (dict(context=-1), "gistnet.context=-1"),
        (dict(input="states"), "gistnet.input=states"),
        (dict(input_layer=-1), "gistnet.input_layer=-1"),
        (dict(type="mean", context=8), "gistnet.type=mean"),
    ],
)
def test_settings_that_are_not_allowed_are_refused_by_name(base, settings, named):
    with pytest.raises(ValueError, match=named):
        GistNet(WIDTH, 1.0, block_size=K, **settings)


@torch.no_grad()
def test_gists_of_gists_see_the_gists_to_their_left_and_the_tree_makes_the_same_ones(base, ids):
    encoder = net(base, context=16, levels=2)
    tree = MegaContextTree.from_tokens(ids, encoder, base)
    for level, starts in ((1, torch.tensor([[K, 80], [16, 144]])), (2, torch.tensor([[64], [64]]))):
        gists = encoder.compress(base, unread(ids), starts, level).vectors
        for b in range(2):
            index = starts[b] // K**level
            torch.testing.assert_close(tree.gists(level)[b, index], gists[b], rtol=1e-4, atol=1e-5)
    before = encoder.compress(base, unread(ids), torch.tensor([[64], [64]]), 2).vectors
    after = encoder.compress(base, unread(changed(ids, 50)), torch.tensor([[64], [64]]), 2).vectors
    assert (before - after).abs().max() > 1e-6, "token 50 is in one of the two blocks to the left"


def test_every_parameter_of_a_net_over_hidden_states_gets_a_gradient(base, ids):
    encoder = net(base, input="hidden", context=8)
    encoder.compress(base, prefill(base, ids, with_states=True), torch.tensor([[80], [16]])).vectors.pow(
        2
    ).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())
