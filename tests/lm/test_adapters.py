"""LoRA on a base LM: where it is put, that it starts as nothing, can be switched off, and merges into plain weights."""

import warnings

import pytest
import torch
from small_base import FAMILIES, SMALL
from transformers import AutoModelForCausalLM

from megactx.lm import BaseLM
from megactx.lm.adapters import adapt, adapters_of, merged, stamp_of, switched_off


def base_of(kind: str = "llama", **more) -> BaseLM:
    torch.manual_seed(0)
    return BaseLM.from_config(SMALL | dict(model_type=kind) | more).freeze()


def filled(base: BaseLM) -> BaseLM:
    generator = torch.Generator().manual_seed(1)
    for p in adapters_of(base).values():
        p.data = torch.randn(p.shape, generator=generator) * 0.2
    return base


@torch.no_grad()
def logits(base: BaseLM) -> torch.Tensor:
    ids = torch.arange(20)[None] % 97
    return base.logits(base(base.embed(ids), None))


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("layers", ["first_two", "last_two", "all"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_it_starts_as_nothing_is_switched_off_and_merges_to_the_same_logits(kind, layers, embeddings):
    base = base_of(kind)
    before = logits(base)
    adapt(base, 4, layers, embeddings)
    torch.testing.assert_close(logits(base), before, rtol=0, atol=0)
    filled(base)
    with_adapters = logits(base)
    assert (with_adapters - before).abs().max() > 1e-2
    with switched_off(base):
        torch.testing.assert_close(logits(base), before, rtol=0, atol=0)
    torch.testing.assert_close(logits(base), with_adapters, rtol=0, atol=0)
    plain = merged(base)
    torch.testing.assert_close(logits(plain), with_adapters, rtol=1e-4, atol=1e-4)
    assert not adapters_of(plain) and type(plain.model) is type(base.model)
    names = {name for name, _ in base_of(kind).named_parameters()}
    assert {name for name, _ in plain.named_parameters()} - names <= {"model.lm_head.weight"}, "it may be untied"


@pytest.mark.parametrize(("layers", "where"), [("first_two", {0, 1}), ("last_two", {2, 3}), ("all", {0, 1, 2, 3})])
def test_it_stands_on_the_four_projections_of_the_chosen_layers(layers, where):
    base = base_of()
    adapt(base, 8, layers)
    found = {(int(name.split(".")[3]), name.split(".")[5]) for name in adapters_of(base)}
    assert found == {(layer, part) for layer in where for part in ("q_proj", "k_proj", "v_proj", "o_proj")}
    assert all(p.requires_grad for p in adapters_of(base).values())
    assert sum(p.requires_grad for p in base.parameters()) == len(adapters_of(base))


def test_tied_embeddings_are_untied_where_adapted_ones_are_merged_and_load_so(tmp_path):
    base = base_of(tie_word_embeddings=True)
    head = base.model.get_output_embeddings().weight.clone()
    adapt(base, 4, "last_two", embeddings=True)
    assert base.width == 64 and base.vocab_size == 97
    plain = merged(filled(base))
    torch.testing.assert_close(plain.model.get_output_embeddings().weight, head, rtol=0, atol=0)
    assert (plain.model.get_input_embeddings().weight - head).abs().max() > 1e-2
    assert not plain.config.tie_word_embeddings and base.config.tie_word_embeddings
    plain.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    torch.testing.assert_close(logits(BaseLM(again)), logits(plain), rtol=0, atol=0)
    torch.testing.assert_close(logits(plain), logits(base), rtol=1e-4, atol=1e-4)


def test_switching_off_leaves_who_trains_as_it_was():
    base = base_of()
    first, *others = adapt(base, 4)
    for p in others:
        p.requires_grad_(False)
    with switched_off(base):
        pass
    assert first.requires_grad and not any(p.requires_grad for p in others)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((2, "all"), "stage.lora.rank=2 is not allowed: from 4 to 16"),
        ((4, "middle"), "lora.layers=middle is not known"),
    ],
)
def test_a_setting_that_is_not_allowed_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        adapt(base_of(), *asked)


def test_adapters_are_put_in_once():
    base = base_of()
    adapt(base, 4)
    with pytest.raises(ValueError, match="has adapters already"):
        adapt(base, 4)


def test_a_merged_base_lm_takes_adapters_without_a_warning_as_one_that_never_had_any():
    base = BaseLM.from_pretrained("asset:tiny-base", "float32").freeze()
    adapt(base, 4)
    plain = merged(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(plain, 4)
    assert adapters_of(plain).keys() == adapters_of(base).keys()


def test_a_place_for_a_module_that_is_empty_is_no_obstacle():
    base = base_of()
    base.model.register_module("head_that_is_not_there", None)  # as models do for optional parts
    assert stamp_of(base) == ()
    adapt(base, 4)
    assert len(stamp_of(base)) > 0
