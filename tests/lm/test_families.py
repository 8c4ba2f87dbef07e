"""Families that call their modules by other names: supported where they work, refused in one sentence where not."""

import pytest
import torch
from small_base import SMALL, small

from megactx.gist.carriers.avgpool import AvgPool
from megactx.gist.carriers.gisting import Gisting
from megactx.lm import BaseLM
from megactx.lm.adapters import adapt, adapters_of, merged
from megactx.lm.kv_hooks import keys_values, recorded
from megactx.lm.prefill import prefill

GPT2 = dict(model_type="gpt2", vocab_size=97, n_embd=64, n_layer=3, n_head=4, n_positions=128)
NEOX = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"} | dict(model_type="gpt_neox")
FALCON = dict(model_type="falcon", vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
IDS = torch.arange(3, 23)[None]


def base_of(config: dict) -> BaseLM:
    torch.manual_seed(0)
    return BaseLM.from_config(config | dict(bos_token_id=0, eos_token_id=1)).freeze()


@torch.no_grad()
def logits(base: BaseLM) -> torch.Tensor:
    return base.logits(base(base.embed(IDS), None))


@pytest.mark.parametrize("config", [GPT2, NEOX], ids=["gpt2", "gpt_neox"])
def test_adapters_stand_in_every_family_and_merge_to_the_same_logits(config):
    base = base_of(config)
    before = logits(base)
    adapt(base, 4, "last_two", embeddings=True)
    torch.testing.assert_close(logits(base), before, rtol=0, atol=0)
    for p in adapters_of(base).values():
        p.data = torch.randn(p.shape) * 0.2
    changed = logits(base)
    assert (changed - before).abs().max() > 1e-2
    torch.testing.assert_close(logits(merged(base)), changed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [GPT2, NEOX], ids=["gpt2", "gpt_neox"])
def test_states_are_recorded_in_every_family(config):
    base = base_of(config)
    with torch.no_grad(), recorded(base.model.get_decoder()) as states:
        base(base.embed(IDS), None)
    expected = base.model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert len(states) == len(expected)
    for mine, theirs in zip(states[:-1], expected[:-1], strict=True):  # theirs ends behind the final norm
        torch.testing.assert_close(mine, theirs)


@torch.no_grad()
def test_keys_and_values_of_gpt_neox_are_those_that_it_caches():
    base = base_of(NEOX)
    read = prefill(base, IDS, with_states=True)
    positions = torch.arange(IDS.shape[1])[None]
    made = keys_values(base.model.get_decoder(), read.states[:-1], positions)
    for mine, theirs in zip(made, read.cache, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    Gisting(base, 4, rank=4).compress(base, read, torch.tensor([[4, 8]]))


def test_a_compressor_of_keys_and_values_is_refused_where_the_family_makes_them_otherwise():
    base = base_of(GPT2)
    with pytest.raises(ValueError, match="compressor=gisting: .* base gpt2 makes in a way that is not supported"):
        Gisting(base, 4)
    with pytest.raises(ValueError, match="base gpt2"):
        AvgPool(4).compress(base, prefill(base, IDS, with_states=True), torch.tensor([[4]]))


@pytest.mark.parametrize("alibi", [False, True])
def test_a_family_without_the_attention_interface_is_refused_when_it_is_loaded(alibi):
    with pytest.raises(ValueError, match="base: falcon does not use transformers' attention interface"):
        BaseLM.from_config(FALCON | {"alibi": alibi})


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 128,
            "factor": 4.0,
        },
    ],
    ids=["dynamic", "longrope"],
)
def test_frequencies_that_depend_on_the_length_of_a_pass_are_refused(rope):
    with pytest.raises(ValueError, match=f"base: llama has rope_type={rope['rope_type']}"):
        small("llama", rope_parameters=rope)


def test_a_dynamic_rope_with_a_fixed_alpha_does_not_depend_on_it_and_is_taken():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 8.0, "factor": 1.0}
    assert small("hunyuan_v1_dense", rope_parameters=rope, head_dim=16).width == 64


def test_the_scale_of_embeddings_is_that_of_what_the_model_reads():
    base = small("gemma", head_dim=16)  # scales them by sqrt(D) inside its embedding layer
    read = base.embed(torch.arange(97)).pow(2).mean().sqrt().item()
    assert base.embedding_rms() == pytest.approx(read, rel=1e-6)
    table = base.model.get_input_embeddings().weight.pow(2).mean().sqrt().item()
    assert read == pytest.approx(8 * table, rel=1e-3)
    assert small("llama").embedding_rms() == pytest.approx(
        small("llama").model.get_input_embeddings().weight.pow(2).mean().sqrt().item(), rel=1e-6
    )


@torch.no_grad()
def test_a_base_that_normalises_what_it_reads_reads_raw_and_rescaled_means_alike():
    positions = torch.arange(40, 53)[None]
    moved = {}
    for kind in ("nanochat", "llama"):
        base = small(kind).freeze()
        embeddings = base.embed(IDS)
        mean = embeddings[:, :8].mean(1, keepdim=True)
        rescaled = mean * base.embedding_rms() / mean.pow(2).mean().sqrt()
        raw, other = (
            base(torch.cat([gist, embeddings[:, 8:]], dim=1), positions, "causal") for gist in (mean, rescaled)
        )
        moved[kind] = float((raw - other)[:, 1:].abs().max())
    assert moved["nanochat"] < 1e-2 < moved["llama"]
