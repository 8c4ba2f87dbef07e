"""GistNets whose backbone is the base LM's own first layers."""

import copy

import pytest
import torch

from megactx.gist.compressors import build
from megactx.lm.adapters import adapters_of
from megactx.lm.kv_hooks import recorded
from megactx.lm.prefill import prefill, unread
from megactx.memory import MegaContextTree
from megactx.memory.encoding import identity_of_layers
from megactx.parts.read import load_gistnet
from megactx.parts.write import save_gistnet

K = 8
OWN = {"type": "base", "layers": 2, "rank": 4, "block_size": K}
FAMILIES = ("llama", "qwen3", "gpt2", "gpt_neox")


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(2)
    return torch.randint(3, 97, (2, 96))


def net(base, **settings):
    """One that training has moved: B of its adapters, and its head, are not zero."""
    torch.manual_seed(1)
    made = build(base, OWN | settings).eval()
    for p in made.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return made


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_fresh_one_gives_what_the_bases_layers_give_where_every_token_sees_the_whole_block(make_base, kind, ids):
    base = make_base(kind)
    made = build(base, OWN)
    x = base.embed(ids[:, :K])
    with recorded(base.model.get_decoder()) as states:
        base(x, torch.arange(K).expand(2, -1), torch.ones(2, 1, K, K, dtype=torch.bool))
    decoder = base.model.get_decoder()
    norm = next(m for name, m in decoder.named_children() if "norm" in name or name == "ln_f")
    torch.testing.assert_close(made.backbone(x), made.backbone.norm(norm(states[2])))


def test_the_base_stays_what_it_was_and_the_net_holds_nothing_of_it(make_base, ids):
    base = make_base()
    before = {name: (p, p.detach().clone(), p.requires_grad) for name, p in base.named_parameters()}
    made = net(base)
    gists = made.compress(base, unread(ids), torch.tensor([[8, 24], [16, 40]])).vectors
    gists.square().sum().backward()
    now = dict(base.named_parameters())
    assert now.keys() == before.keys() and not adapters_of(base)
    for name, (p, was, learned) in before.items():
        assert now[name] is p and torch.equal(p, was) and p.requires_grad == learned and p.grad is None
    assert all(p.grad is not None and p.grad.any() for p in made.backbone.adapters.values())
    shapes = sum(p.numel() for p in made.state_dict().values())
    assert shapes == sum(p.numel() for p in made.parameters()) < sum(p.numel() for p in base.parameters())


def test_who_trains_in_the_base_goes_on_training(make_base):
    base = make_base()
    base.requires_grad_(True)
    build(base, OWN)
    assert all(p.requires_grad for p in base.parameters())


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"pooling": "cls"}, {"context": 16}, {"input": "hidden", "input_layer": 1}])
def test_it_reads_its_block_and_what_it_is_told_to_and_nothing_behind(make_base, settings, ids):
    base, starts = make_base(), torch.tensor([[24], [24]])
    made = net(base, **settings)

    def gist(ids):
        return made.compress(base, prefill(base, ids, with_states=True), starts).vectors

    mine, far = gist(ids), 0 if made.needs_hidden else 24 - made.left_context
    for at in (0, 7, 8, 23, 24, 31, 32):
        other = ids.clone()
        other[:, at] = (other[:, at] - 3 + 1) % 94 + 3
        moved = (gist(other) - mine).abs().max()
        assert (moved > 1e-6) == (far <= at < 32), f"token {at}"


@torch.no_grad()
def test_states_of_a_layer_go_on_from_that_layer(make_base, ids):
    """At layer 0 the states are the embeddings."""
    base, starts = make_base(), torch.tensor([[24], [24]])
    one, two = net(base), net(base, input="hidden", input_layer=0)
    two.load_state_dict(one.state_dict())
    read = prefill(base, ids, with_states=True)
    torch.testing.assert_close(
        one.compress(base, read, starts).vectors, two.compress(base, read, starts).vectors, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_it_is_saved_without_the_base_and_is_the_same_again(make_base, ids, tmp_path):
    base, starts = make_base(), torch.tensor([[8, 24], [16, 40]])
    made = net(base).to(torch.bfloat16).float()
    save_gistnet(made, OWN, base, tmp_path / "net")
    again = load_gistnet(tmp_path / "net", base)
    assert torch.equal(*(n.compress(base, unread(ids), starts).vectors for n in (made, again)))
    other = copy.deepcopy(base)
    other.model.get_decoder().layers[1].mlp.up_proj.weight.data += 0.1
    with pytest.raises(ValueError, match="another base LM"):
        load_gistnet(tmp_path / "net", other)


@torch.no_grad()
def test_a_tree_of_its_gists_is_of_the_bases_layers_too(make_base, ids):
    base = make_base()
    made = net(base)
    assert MegaContextTree.from_tokens(ids, made, base).depth == 2
    other = copy.deepcopy(base)
    other.model.get_decoder().layers[3].mlp.up_proj.weight.data += 0.1
    assert identity_of_layers(base, made) != identity_of_layers(other, made)
    assert identity_of_layers(base, net(base, type="transformer", num_heads=4)) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layers": 5}, "gistnet.layers=5 is not allowed with gistnet.type=base: 1 to 4"),
        ({"input": "hidden", "input_layer": 3}, "gistnet.layers=2 .* from layer 3"),
        ({"rank": 200}, "gistnet.rank=200"),
        ({"dropout": 0.1}, "gistnet.dropout=0.1"),
    ],
)
def test_a_setting_that_is_not_allowed_is_named(make_base, settings, said):
    with pytest.raises(ValueError, match=said):
        build(make_base(), OWN | settings)
