"""Prefills that are kept on disk say what a pass would say, to the same bits whether a file was there or not."""

import pytest
import torch
from small_base import small

from megactx.lm.prefill import prefill
from megactx.lm.prefill_cache import PrefillCache

LENGTHS = torch.tensor([40, 25])


@pytest.fixture
def base(monkeypatch, tmp_path):
    monkeypatch.setenv("MEGACTX_CACHE", str(tmp_path))
    return small()


@pytest.fixture
def ids():
    torch.manual_seed(2)
    found = torch.randint(3, 97, (2, 40))
    found[1, 25:] = 0
    return found


def tensors(read):
    return [read.hidden, *(part for layer in read.cache for part in layer), *read.states]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
def test_what_is_kept_is_what_a_pass_gives(base, ids, dtype, tolerance):
    kept, whole = PrefillCache(base, 1, dtype, layers=[1, 3])(ids, LENGTHS), prefill(base, ids, with_states=True)
    for row, length in enumerate(LENGTHS.tolist()):
        for mine, theirs in zip(kept.cache, whole.cache, strict=True):
            for one, two in zip(mine, theirs, strict=True):
                torch.testing.assert_close(one[row, :, :length], two[row, :, :length], rtol=tolerance, atol=tolerance)
                assert not one[row, :, length:].any()
        for one, two in [(kept.hidden, whole.hidden), *((kept.states[n], whole.states[n]) for n in (1, 3))]:
            torch.testing.assert_close(one[row, :length], two[row, :length], rtol=tolerance, atol=tolerance)
    assert kept.hidden.dtype == torch.float32 and [len(state) for state in kept.states] == [0, 2, 0, 2, 0]


def test_a_run_has_the_same_bits_whether_a_file_was_there_or_not_and_in_any_company(base, ids):
    first = PrefillCache(base, 1)(ids, LENGTHS)
    again = PrefillCache(base, 1)(ids, LENGTHS)
    nothing_kept = PrefillCache(base, 1e-9)(ids, LENGTHS)
    alone = PrefillCache(base, 1e-9)(ids[:1], LENGTHS[:1])
    for one, two, three, four in zip(*map(tensors, (first, again, nothing_kept, alone)), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three) and torch.equal(one[:1], four)


def test_a_document_is_read_once_and_its_states_where_they_are_wanted_later(base, ids, monkeypatch):
    passes = []
    monkeypatch.setattr("megactx.lm.prefill_cache.prefill", lambda *a: passes.append(1) or prefill(*a))
    PrefillCache(base, 1)(ids, LENGTHS)
    PrefillCache(base, 1)(ids.flip(0), LENGTHS.flip(0))
    assert len(passes) == 2
    PrefillCache(base, 1, layers=[2])(ids, LENGTHS)
    PrefillCache(base, 1, layers=[2])(ids, LENGTHS)
    PrefillCache(base, 1)(ids, LENGTHS)
    assert len(passes) == 4
    other = small(rope_theta=500.0)
    PrefillCache(other, 1)(ids, LENGTHS)
    assert len(passes) == 6, "another base LM has prefills of its own"


def test_there_is_no_more_than_was_allowed_and_a_damaged_file_is_made_anew(base, ids):
    cache = PrefillCache(base, 1)
    size = 40 * cache.bytes_per_token()
    small_one = PrefillCache(base, 1.05 * (size + 1000) / 1e9)
    whole = small_one(ids, LENGTHS)
    (file,) = cache.folder.glob("*.safetensors")
    assert size <= file.stat().st_size <= size + 1000
    assert not list(cache.folder.glob(".megactx-part-*"))
    file.write_bytes(file.read_bytes()[: size // 2])
    for one, two in zip(tensors(whole), tensors(PrefillCache(base, 1)(ids, LENGTHS)), strict=True):
        assert torch.equal(one, two)
    assert len(list(cache.folder.glob("*.safetensors"))) == 2


def test_numbers_that_do_not_fit_into_16_bits_are_refused_by_the_settings_name(base, ids):
    base.model.get_decoder().layers[0].self_attn.v_proj.weight.data *= 1e6
    with pytest.raises(ValueError, match="stage.prefills.dtype=float16 .* values are too large"):
        PrefillCache(base, 1)(ids, LENGTHS)
    assert PrefillCache(base, 1, "float32")(ids, LENGTHS).hidden.isfinite().all()


def test_settings_that_are_not_allowed_are_named(base):
    with pytest.raises(ValueError, match="stage.prefills.dtype=int8"):
        PrefillCache(base, 1, "int8")
    with pytest.raises(ValueError, match=r"gistnet.input_layer=5 is not allowed: 0 to 4"):
        PrefillCache(base, 1, layers=[5])
