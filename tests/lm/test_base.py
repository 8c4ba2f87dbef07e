"""The base LM is the Hugging Face model itself, read through embeddings."""

import pytest
import torch
from small_base import FAMILIES, SMALL, small

from megactx.lm import BaseLM, masks


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_embeddings_with_and_without_a_mask_give_the_plain_models_logits(kind):
    base = small(kind)
    ids = torch.randint(3, 97, (2, 40))
    plain = base.model(input_ids=ids).logits
    positions = torch.arange(40).expand(2, -1)
    torch.testing.assert_close(base.logits(base(base.embed(ids), None)), plain)
    torch.testing.assert_close(
        base.logits(base(base.embed(ids), positions, masks.causal(40))), plain, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_a_cached_pass_with_an_explicit_mask_equals_one_pass(kind):
    from transformers import DynamicCache

    base = small(kind)
    ids = torch.randint(3, 97, (1, 24))
    whole = base(base.embed(ids), None)
    cache = DynamicCache()
    base(base.embed(ids[:, :16]), None, cache=cache)
    mask = masks.causal(24)[:, :, 16:]
    rest = base(base.embed(ids[:, 16:]), torch.arange(16, 24)[None], mask, cache)
    torch.testing.assert_close(rest, whole[:, 16:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_plain_causal_attention_equals_its_mask_at_positions_that_jump_with_gradients_and_a_cache_filled(kind):
    from transformers import DynamicCache

    base = small(kind)
    ids = torch.randint(3, 97, (2, 24))
    positions = torch.arange(24).expand(2, -1).clone()
    positions[0, 10:] += 7
    positions[1, 3:] += 200
    sigma = torch.zeros(2, 24)
    sigma[:, 5] = 4.0
    found = {}
    for name, mask in (("plain", masks.CAUSAL), ("masked", masks.causal(24))):
        rows, cache = base.embed(ids).requires_grad_(), DynamicCache()
        hidden = base(rows, positions, mask, cache, sigma)
        gradient = torch.autograd.grad(hidden.square().sum(), rows)[0]
        found[name] = [hidden, gradient, *(part for layer in cache.layers for part in (layer.keys, layer.values))]
    for plain, masked in zip(found["plain"], found["masked"], strict=True):
        torch.testing.assert_close(plain, masked, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_jump_in_positions_does_not_cut_attention():
    """transformers reads a jump without a mask as a border between packed sequences: our pass must not be cut there."""
    base = small("llama")
    ids = torch.randint(3, 97, (1, 20))
    positions = torch.arange(20)[None].clone()
    positions[:, 10:] += 7
    changed = ids.clone()
    changed[0, 3] = (ids[0, 3] - 3 + 1) % 94 + 3
    mask = masks.causal(20)
    hidden, other = (base(base.embed(x), positions, mask) for x in (ids, changed))
    assert (hidden[0, -1] - other[0, -1]).abs().max() > 1e-5, "the last row no longer sees a token before the jump"
    unmasked, unmasked_other = (
        base.model.model(inputs_embeds=base.embed(x), position_ids=positions, use_cache=False).last_hidden_state
        for x in (ids, changed)
    )
    assert torch.equal(unmasked[0, -1], unmasked_other[0, -1]), "the trap is gone from transformers: the guard may go"


def test_positions_without_a_mask_are_refused():
    base = small("llama")
    with pytest.raises(AssertionError, match="come together"):
        base(base.embed(torch.zeros(1, 4, dtype=torch.long)), torch.arange(4)[None])


def test_a_frozen_base_stays_in_eval_mode_and_takes_no_gradient():
    base = small("llama")
    torch.nn.ModuleList([base]).train()
    assert not base.training and not base.model.training
    assert not any(p.requires_grad for p in base.parameters())


def test_a_saved_folder_loads_with_its_tokenizer(tmp_path, tiny_tokenizer):
    base = BaseLM.from_config({**SMALL, "vocab_size": 512, "model_type": "llama"}).freeze()
    base.model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    loaded = BaseLM.from_pretrained(str(tmp_path))
    ids = torch.randint(3, 97, (1, 8))
    torch.testing.assert_close(loaded.freeze()(loaded.embed(ids), None), base(base.embed(ids), None))
    assert loaded.tokenizer.bos_token_id == tiny_tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**SMALL, "model_type": "llama", "num_attention_heads": 5}, "num_attention_heads=5 does not divide"),
        ({**SMALL, "model_type": "llama", "num_key_value_heads": 3}, "num_key_value_heads=3 does not divide"),
        ({**SMALL, "model_type": "no_such_model"}, "model_type=no_such_model"),
        ({**SMALL, "model_type": "gemma3_text", "head_dim": 16}, "gemma3_text uses sliding-window"),
        ({**SMALL, "model_type": "mistral", "sliding_window": 128}, "mistral uses sliding-window"),
    ],
)
def test_a_base_that_cannot_work_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        BaseLM.from_config(config)


def test_a_model_that_takes_no_inputs_embeds_is_refused():
    base = small("llama")
    decoder = base.model.get_decoder()
    decoder.forward = lambda input_ids, attention_mask=None: None
    with pytest.raises(ValueError, match="does not take inputs_embeds"):
        BaseLM(base.model)


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="tokenizer has 512 ids, but the model only 97"):
        BaseLM(small("llama").model, tiny_tokenizer)


def test_a_missing_folder_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="base.name="):
        BaseLM.from_pretrained(str(tmp_path / "nothing"))


def test_branch_mask_lets_a_row_see_its_prefix_and_earlier_rows_of_its_own_branch_only():
    cache_len = torch.tensor([[2, 4]])
    mask = masks.branches(cache_len, rows=2, columns=5)[0, 0].int().tolist()
    assert mask == [
        [1, 1, 0, 0, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 1, 0],
        [1, 1, 1, 1, 0, 0, 0, 1, 1],
    ]
