"""Every pooling x head x depth: a gist that depends on its whole block, at the scale of a token."""

from types import SimpleNamespace

import pytest
import torch

from megactx.gist import GistNet, heads, poolings
from megactx.gist.backbone import rotary
from megactx.gist.losses.contrastive import pushed_apart
from megactx.gist.parts import names

WIDTH, K, RMS = 32, 8, 0.05
POOLINGS, HEADS = names(poolings), names(heads)


def net(**settings) -> GistNet:
    torch.manual_seed(0)
    return GistNet(WIDTH, RMS, block_size=K, **{"num_heads": 4, **settings})


def embeddings(blocks: int = 6) -> torch.Tensor:
    return torch.randn(blocks, K, WIDTH, generator=torch.Generator().manual_seed(1)) * RMS


def test_the_designs_six_heads_are_there():
    assert {"mean", "query", "cls"} <= set(POOLINGS) and {"linear", "mlp"} <= set(HEADS)


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_fresh_gist_depends_on_every_token_of_its_block_and_has_the_scale_of_a_token(pooling, head, layers):
    gistnet = net(pooling=pooling, head=head, layers=layers, skip="none").eval()
    x = embeddings()
    gist = gistnet.encode_block(x)
    assert gist.shape == (6, WIDTH) and gist.dtype == torch.float32
    assert gist.pow(2).mean().sqrt().item() == pytest.approx(RMS, rel=0.05)
    assert gist.std(dim=0).max() > 0.1 * RMS, "the gist is a constant"
    for token in range(K):
        changed = x.clone()
        changed[:, token] = embeddings(12)[6:, token]
        moved = (gistnet.encode_block(changed) - gist).abs().amax(dim=1)
        assert (moved > 1e-6).all(), f"token {token} does not reach the gist"


@pytest.mark.parametrize("type", ["transformer", "mean"])
@pytest.mark.parametrize("skip", ["last", "mean"])
def test_a_skip_starts_at_what_it_skips_and_sees_every_token_once_its_correction_moves(type, skip):
    gistnet = net(type=type, skip=skip)
    x = embeddings()
    start = gistnet.encode_block(x)
    if skip == "last":
        torch.testing.assert_close(start, x[:, -1])
    else:
        assert start.pow(2).mean().sqrt().item() == pytest.approx(RMS, rel=0.05)
    start.pow(3).sum().backward()
    assert gistnet.head.last.weight.grad.abs().max() > 0
    torch.nn.init.normal_(gistnet.head.last.weight, std=0.1)
    gist = gistnet.encode_block(x)
    for token in range(K):
        changed = x.clone()
        changed[:, token] *= -1
        assert ((gistnet.encode_block(changed) - gist).abs().amax(dim=1) > 1e-6).all()


def test_every_parameter_gets_a_gradient():
    for pooling in POOLINGS:
        for head in HEADS:
            gistnet = net(pooling=pooling, head=head, skip="none")
            gistnet.encode_block(embeddings()).pow(3).sum().backward()
            dead = [name for name, p in gistnet.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
            assert not dead, f"{pooling} x {head}: no gradient reaches {dead}"


def test_cls_is_prepended_exactly_once():
    gistnet = net(pooling="cls")
    assert gistnet.backbone(embeddings()).shape == (6, K + 1, WIDTH)
    assert net(pooling="mean").backbone(embeddings()).shape == (6, K, WIDTH)


def test_blocks_are_encoded_independently_of_their_batch():
    gistnet = net(skip="none").eval()
    x = embeddings()
    torch.testing.assert_close(gistnet.encode_block(x)[2:3], gistnet.encode_block(x[2:3]), rtol=1e-5, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("pooling", POOLINGS)
def test_attention_is_that_of_the_pooling_or_of_the_last_layer(pooling):
    gistnet = net(pooling=pooling, layers=2).eval()
    x = embeddings()
    weights = gistnet.attention(x)
    if hasattr(gistnet.pooling, "attention") and pooling not in ("query", "cls"):
        pytest.skip("it attends in its own way")
    states = K + int(gistnet.pooling.needs_cls)
    shape = {"query": (6, 1, 1, K), "cls": (6, 4, 1, states)}.get(pooling, (6, 4, states, states))
    assert weights.shape == shape and weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(shape[:-1]))

    # Plain: the last layer's input is what the layers before it give; then one score at a time.
    backbone, scaled = gistnet.backbone, x / RMS
    if pooling == "query":
        states, query = backbone(scaled), gistnet.pooling.query
        plain = torch.stack([states[:, k] @ query for k in range(K)], dim=-1) / WIDTH**0.5
        torch.testing.assert_close(weights[:, 0, 0], plain.softmax(-1))
        return
    seen = []
    hook = backbone.blocks[-1].qkv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    fast = backbone(scaled)
    hook.remove()
    rows = fast.shape[1]
    positions = torch.arange(rows) - int(gistnet.pooling.needs_cls)
    query, key = (part.view(6, rows, 4, WIDTH // 4).transpose(1, 2) for part in seen[0].split(WIDTH, dim=-1)[:2])
    query, key = rotary(query, positions), rotary(key, positions)
    asked = range(1 if pooling == "cls" else rows)
    for head in range(4):
        for row in asked:
            scores = torch.stack([(query[:, head, row] * key[:, head, k]).sum(-1) for k in range(rows)], dim=-1)
            torch.testing.assert_close(weights[:, head, row], (scores / (WIDTH // 4) ** 0.5).softmax(-1))
    slow, _ = backbone.with_attention(scaled)
    torch.testing.assert_close(slow, fast, rtol=1e-4, atol=1e-5)


def test_a_net_without_a_backbone_attends_nowhere():
    assert net(type="mean").attention(embeddings()) is None


@torch.no_grad()
def test_a_gist_of_a_level_is_the_gist_of_the_gists_below():
    gistnet = net(skip="none")
    x = torch.randn(3, K * K, WIDTH) * RMS
    below = torch.stack([gistnet.encode_block(x[:, i * K : (i + 1) * K]) for i in range(K)], dim=1)
    torch.testing.assert_close(gistnet.encode_lod(x, 2), gistnet.encode_block(below))
    torch.testing.assert_close(gistnet.encode_lod(x[:, :K], 1), gistnet.encode_block(x[:, :K]))
    for tokens, lod in ((K, 2), (K * K, 1), (K, 0)):
        with pytest.raises(ValueError, match=f"stands for {K}.{lod} embeddings, not {tokens}"):
            gistnet.encode_lod(x[:, :tokens], lod)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 5}, r"gistnet.num_heads=5 .* allowed are 1, 2, 4, 8, 16"),
        ({"num_heads": 32}, "gistnet.num_heads=32"),
        ({"pooling": "none"}, f"gistnet.pooling=none is not known, allowed are {', '.join(POOLINGS)}"),
        ({"head": "conv"}, "gistnet.head=conv"),
        ({"skip": "first"}, "gistnet.skip=first"),
        ({"position": "start"}, "gistnet.position=start"),
        ({"type": "rnn"}, "gistnet.type=rnn"),
        ({"layers": 0}, "gistnet.layers=0"),
        ({"dropout": 1.0}, "gistnet.dropout=1.0"),
        ({"slots": 3}, f"gistnet.slots=3 does not divide block_size={K}"),
        ({"slots": 2, "levels": 2}, "levels=2 is not allowed with gistnet.slots=2: 1"),
        ({"slots": 2, "pooling": "cls"}, "pooling=cls is not allowed with gistnet.slots=2: it has one CLS vector"),
    ],
)
def test_a_setting_that_is_not_allowed_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        net(**settings)


@pytest.mark.parametrize("shape", [(2, K + 1, WIDTH), (2, K, WIDTH + 1), (K, WIDTH)])
def test_embeddings_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match="expected"):
        net().encode_block(torch.zeros(shape))


def test_token_ids_in_place_of_embeddings_are_refused():
    with pytest.raises(ValueError, match="dtype"):
        net().encode_block(torch.zeros(2, K, WIDTH, dtype=torch.long))


def test_position_is_the_centre_or_the_end_of_the_block():
    assert (net(position="centre").offset, net(position="end").offset) == (K // 2, K - 1)
    assert (net(position="centre").offset_in(K * K), net(position="end").offset_in(K * K)) == (K * K // 2, K * K - 1)


def test_flops_grow_with_depth_and_match_the_formula():
    # Linear layers alone: 2 x K x 12 D^2 per block of the backbone; a wide net is nearly all linear.
    def flops(net):
        return net.flops_per_block(SimpleNamespace(embed=torch.nn.Embedding(1, net.width)))

    assert flops(GistNet(640, RMS, layers=2)) == pytest.approx(0.63e9, rel=0.05)
    one, two, four = (flops(net(layers=n)) for n in (1, 2, 4))
    assert two - one == pytest.approx((four - two) / 2) and two > one
    assert flops(net(type="mean")) < one
    assert flops(net(layers=1, context=K)) > 1.5 * one, "what is read to the left of the block counts too"


def test_contrastive_pushes_near_neighbours_apart_and_leaves_far_ones_alone():
    gist = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    near, far = torch.tensor([[1.0, 0.1]]), torch.tensor([[-1.0, 0.0]])
    loss = pushed_apart(gist, torch.cat([near, far]), margin=0.2)
    loss.backward()
    moved = gist.detach() - 0.1 * gist.grad
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(moved[:1], near) < cosine(gist.detach()[:1], near)
    assert torch.equal(gist.grad[1], torch.zeros(2))
    expected = max(0.0, 0.2 - (1 - cosine(gist[:1], near).item())) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_contrastive_without_pairs_is_an_error():
    with pytest.raises(ValueError, match="contrastive.weight"):
        pushed_apart(torch.zeros(0, 4), torch.zeros(0, 4), 0.2)


def test_forward_gives_gradient_to_both_sides_of_a_pair():
    gistnet = net(skip="none")
    x, y = embeddings().requires_grad_(), (embeddings() * 1.01).requires_grad_()
    gists, terms = gistnet(x, y, margin=0.2)
    torch.testing.assert_close(gists, gistnet.encode_block(x))
    terms["contrastive"].backward()
    assert x.grad.abs().max() > 0 and y.grad.abs().max() > 0


def test_one_set_of_weights_serves_every_level_and_the_levels_below_are_there():
    gistnet = net().eval()
    x = torch.randn(2, K**2, WIDTH, generator=torch.Generator().manual_seed(1)) * RMS
    below, top = gistnet.encode_lods(x, 2)
    assert below.shape == (2, K, WIDTH) and top.shape == (2, 1, WIDTH)
    for index in range(K):
        torch.testing.assert_close(below[:, index], gistnet.encode_block(x[:, index * K : (index + 1) * K]))
    torch.testing.assert_close(top[:, 0], gistnet.encode_block(below))
    assert torch.equal(gistnet.encode_lod(x, 2), top[:, 0]) and not gistnet.above


def test_gists_of_gists_can_have_weights_of_their_own():
    shared, apart = net(skip="none").eval(), net(skip="none", levels=2).eval()
    x = torch.randn(2, K**2, WIDTH, generator=torch.Generator().manual_seed(1)) * RMS
    one, two = shared.encode_lods(x, 2), apart.encode_lods(x, 2)
    assert torch.equal(one[0], two[0]), "the first level changed"
    assert not torch.allclose(one[1], two[1], rtol=0.1)
    torch.testing.assert_close(two[1][:, 0], apart.above[0].encode_block(two[0]))
    two[1].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in apart.parameters()), "both levels are trained"
    high = net(skip="none", levels=2).eval().encode_lods(torch.randn(1, K**3, WIDTH) * RMS, 3)
    torch.testing.assert_close(high[2][:, 0], apart.above[0].encode_block(high[1]))  # beyond the last: shared
    with pytest.raises(ValueError, match="gistnet.levels=0"):
        net(levels=0)


def test_a_block_is_encoded_under_the_name_of_the_design_too():
    assert GistNet.encode_span is GistNet.encode_block


@pytest.mark.parametrize("pooling", ["mean", "query"])
def test_slots_of_a_net_without_a_backbone_are_gists_of_smaller_blocks(pooling):
    settings = {"type": "mean"} if pooling == "mean" else {"num_heads": 2, "pooling": pooling}
    torch.manual_seed(0)
    net, small = (GistNet(16, 0.02, block_size=k, slots=m, **settings) for k, m in ((8, 4), (2, 1)))
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    small.load_state_dict(net.state_dict())
    x = torch.randn(3, 8, 16) * 0.02
    gists = net.encode_block(x)
    assert gists.shape == (3, 4, 16)
    apart = small.encode_block(x.view(12, 2, 16)).view(3, 4, 16)
    if pooling == "mean":
        torch.testing.assert_close(gists, apart)
    else:  # the backbone reads the whole block, so each slot knows the others' tokens
        assert not torch.allclose(gists, apart)
        moved = x.clone()
        moved[:, 7] += 0.02
        assert ((net.encode_block(moved) - gists).abs().amax(dim=(0, 2)) > 0).all()
