"""A position that is a distribution: what damping is, where it goes, and that a token knows nothing of it."""

import pytest
import torch
from small_base import FAMILIES, SMALL, small
from torch.utils.checkpoint import checkpoint

from megactx.lm import BaseLM, masks
from megactx.lm.gaussian_rope import LODS, GaussianRotary, PositionSpread, spread

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}


def context(base: BaseLM, length: int = 24):
    """Embeddings, positions with a jump, mask."""
    torch.manual_seed(1)
    positions = torch.arange(length)[None].clone()
    positions[:, 10:] += 31
    return base.embed(torch.randint(3, 97, (1, length))), positions, masks.causal(length)


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_context_of_tokens_is_bit_identical_to_plain_rope(kind):
    base = small(kind)
    x, positions, mask = context(base)
    plain = base(x, positions, mask)
    assert torch.equal(base(x, positions, mask, sigma=torch.zeros(1, 24)), plain)
    sigma = torch.zeros(1, 24)
    sigma[0, 10] = 9.2
    damped = base(x, positions, mask, sigma=sigma)
    assert torch.equal(damped[:, :10], plain[:, :10]), "rows before the gist changed"
    assert (damped[:, 10:] - plain[:, 10:]).abs().amax(dim=-1).min() > 1e-6
    assert torch.equal(base(x, positions, mask), plain), "the pass left something behind"


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"rope_parameters": YARN}], ids=["default", "yarn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_damping_is_the_mean_of_rotations_over_the_distribution_of_positions(settings, dtype):
    rotary = small("llama", **settings).model.get_decoder().rotary_emb
    x = torch.zeros(1, 3, 64, dtype=dtype)
    mu, sigma = torch.tensor([[7, 40, 300]]), torch.tensor([[0.0, 9.2, 40.0]])
    cos, sin = GaussianRotary(rotary, sigma)(x, mu)
    assert cos.dtype == dtype
    samples = mu.double() + sigma.double() * torch.randn(20_000, 3, dtype=torch.double)
    angle = samples[..., None] * rotary.inv_freq.double().repeat(2)
    tolerance = 5 / 20_000**0.5 + (4e-3 if dtype == torch.bfloat16 else 1e-5)  # five standard errors, and rounding
    for mine, sampled in ((cos, angle.cos()), (sin, angle.sin())):
        expected = sampled.mean(dim=0) * rotary.attention_scaling
        assert (mine[0].double() - expected).abs().max() < tolerance
    assert (rotary.attention_scaling > 1.1) == bool(settings), "the scaling of a RoPE variant is not kept"
    assert torch.equal(cos[:, 0], rotary(x, mu)[0][:, 0])
    slow, fast = rotary.inv_freq.argmin(), rotary.inv_freq.argmax()
    length = (cos.square() + sin.square()).sqrt()[0, 2] / rotary.attention_scaling
    assert length[fast] < 1e-6 < 0.9 < length[slow], "fast frequencies go, slow ones stay"


@torch.no_grad()
def test_layers_without_rope_are_untouched():
    base = small("smollm3", no_rope_layers=[0, 0, 0, 0])
    x, positions, mask = context(base)
    assert torch.equal(base(x, positions, mask, sigma=torch.full((1, 24), 50.0)), base(x, positions, mask))
    mixed = small("smollm3")
    assert [layer.self_attn.use_rope for layer in mixed.model.model.layers] == [1, 1, 1, 0]
    assert not torch.equal(mixed(x, positions, mask, sigma=torch.full((1, 24), 50.0)), mixed(x, positions, mask))


@torch.no_grad()
def key_of_one_entry(base: BaseLM, sigma) -> torch.Tensor:
    """The first key [D / heads] that attention of layer 0 reads for a lone entry."""
    keys, usual = [], torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = lambda q, k, v, **_: keys.append(k) or usual(q, k, v)
    try:
        torch.manual_seed(2)
        base(torch.randn(1, 1, 64), torch.full((1, 1), 7), masks.causal(1), sigma=sigma)
    finally:
        torch.nn.functional.scaled_dot_product_attention = usual
    return keys[0][0, 0, 0]


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_that_normalises_behind_the_rotation_gives_a_damped_vector_its_length_back(kind):
    """So its direction is that of the expectation, and its slow pairs gain what the fast ones lose."""
    base, sigma = small(kind), 40.0
    plain, damped = key_of_one_entry(base, None), key_of_one_entry(base, torch.full((1, 1), sigma))
    gain = damped.view(2, -1).norm(dim=0) / plain.view(2, -1).norm(dim=0)  # of each rotary frequency
    kept = torch.exp(-((base.model.get_decoder().rotary_emb.inv_freq * sigma) ** 2) / 2)
    torch.testing.assert_close(gain / gain[-1], kept / kept[-1], rtol=1e-3, atol=1e-5)
    shrunk = (damped.norm() / plain.norm()).item()
    if kind == "nanochat":
        left = (kept * plain.view(2, -1).norm(dim=0)).square().sum() / plain.square().sum()
        assert shrunk == pytest.approx(1, abs=1e-3) and gain[-1] > 1.05
        torch.testing.assert_close(gain, kept / left.sqrt(), rtol=1e-3, atol=1e-5)  # as the module's docstring says
    else:
        assert shrunk < 0.95
        torch.testing.assert_close(gain, kept, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["damped", "learned"])
def test_the_spread_is_that_of_a_uniform_position_in_the_span_and_zero_for_tokens(mode):
    sigma = PositionSpread(mode, 32)(torch.tensor([[0, 1, 2, 0]]))
    uniform = [0, 32 / 12**0.5, 1024 / 12**0.5, 0]
    torch.testing.assert_close(sigma, torch.tensor([uniform]))
    assert PositionSpread("plain", 32)(torch.tensor([0, 1])) is None
    with pytest.raises(ValueError, match="gistnet.gaussian_rope=wide is not known, allowed are plain, damped, learned"):
        PositionSpread("wide", 32)


@pytest.mark.parametrize("kind", FAMILIES)
def test_each_lod_has_a_learned_factor_of_its_own_that_gets_a_gradient_through_the_base(kind):
    base, learned = small(kind), PositionSpread("learned", 4)
    x, positions, mask = context(base)
    lods = torch.zeros(1, 24, dtype=torch.long)
    lods[0, 3], lods[0, 8], lods[0, 20] = 1, 2, LODS + 3
    (base(x, positions, mask, sigma=learned(lods)).square() * torch.linspace(0, 1, 64)).sum().backward()
    gradient = learned.log_scale.grad
    assert (gradient[:2] != 0).all() and (gradient[2 : LODS - 1] == 0).all()
    with torch.no_grad():
        learned.log_scale[0] += 0.7
    assert learned(lods)[0, 3].item() == pytest.approx(4 / 12**0.5 * 2.01375, rel=1e-4)
    assert learned(lods)[0, 8].item() == pytest.approx(16 / 12**0.5)


def gradients(kind: str, recompute: str = "") -> tuple[list[torch.Tensor], int]:
    """Of the embeddings and of the learned factors, and how often layer 1 ran, with another pass before backward."""
    base, learned, ran = small(kind), PositionSpread("learned", 4), []
    base._frozen = False  # transformers recomputes layers in train mode only
    base.train()
    base.model.get_decoder().layers[1].self_attn.register_forward_pre_hook(lambda *_: ran.append(1))
    x, positions, mask = context(base)
    x = x.detach().requires_grad_()
    lods = torch.zeros(1, 24, dtype=torch.long)
    lods[0, 3], lods[0, 8] = 1, 2
    sigma = learned(lods)
    if recompute == "layers":
        base.model.activation_checkpointing_enable()
    if recompute == "pass":
        hidden = checkpoint(lambda x, s: base(x, positions, mask, sigma=s), x, sigma, use_reentrant=False)
    else:
        hidden = base(x, positions, mask, sigma=sigma)
    # What is recomputed must not take the sigma of a pass that came later.
    base(x.detach(), positions, mask, sigma=torch.full((1, 24), 3.0))
    (hidden.square() * torch.linspace(0, 1, 64)).sum().backward()
    return [x.grad, learned.log_scale.grad], len(ran)


@pytest.mark.parametrize("recompute", ["layers", "pass"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_gradients_are_the_same_when_activations_are_recomputed(kind, recompute):
    (kept, twice), (again, thrice) = gradients(kind), gradients(kind, recompute)
    assert (twice, thrice) == (2, 3)
    for one, other in zip(kept, again, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_model_without_rotary_embeddings_or_with_another_layout_is_refused_by_name():
    torch.manual_seed(0)
    base = BaseLM.from_config(dict(model_type="gpt2", vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64))
    x = base.embed(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="base gpt2 has no rotary embedding"):
        base(x, torch.arange(4)[None], masks.causal(4), sigma=torch.ones(1, 4))
    cohere = BaseLM.from_config({**SMALL, "model_type": "cohere", "logit_scale": 1.0}).model.get_decoder()
    with pytest.raises(ValueError, match="cohere orders its rotary frequencies in another way"):
        with spread(cohere, torch.ones(1, 4)):
            pass
