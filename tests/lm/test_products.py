"""Attention by products of matrices is attention: outputs and all gradients are those of SDPA with a dense mask."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers.integrations.sdpa_attention import repeat_kv

from megactx.lm import masks, packed_attention, products
from megactx.lm.packed_attention import Branches, attend

B, R, W, T = 2, 5, 8, 40
LENGTHS = torch.tensor([[3, 9, 17, 30], [4, 4, 20, 31]])


class Layer(torch.nn.Module):
    """What transformers hands to an attention function."""

    layer_idx, is_causal, training = 0, True, False

    def __init__(self, groups: int):
        super().__init__()
        self.num_key_value_groups = groups


def tensors(heads: int, shared: int, dtype=torch.float32):
    """Query, own keys and values, cached ones, slots; all of them leaves with a gradient."""
    torch.manual_seed(0)
    rows, branches = LENGTHS.shape[1] * R, LENGTHS.shape[1]
    shapes = [(heads, rows), (shared, rows), (shared, rows), (shared, T), (shared, T), (shared, branches)]
    shapes += [(shared, branches)]
    return [torch.randn(B, *shape, W, dtype=dtype).requires_grad_() for shape in shapes]


def by_mask(query, key, value, old_key, old_value, slot_key, slot_value, slots, begin, groups):
    """One call of SDPA with a mask over all columns."""
    columns = int(LENGTHS.max())
    mask = masks.branches(LENGTHS, R, columns, begin, slots)
    parts = zip((old_key, old_value), (slot_key, slot_value), (key, value), strict=True)
    seen = [torch.cat([old[:, :, :columns], *([slot] if slots else []), own], dim=2) for old, slot, own in parts]
    return F.scaled_dot_product_attention(query, *(repeat_kv(part, groups) for part in seen), mask).transpose(1, 2)


@pytest.mark.parametrize("rows", [R, 2 * R, 64], ids=["one branch a group", "two", "all"])
@pytest.mark.parametrize("slots", [False, True], ids=["rows", "slots"])
@pytest.mark.parametrize("begin", [None, torch.tensor([[0, 2, 5, 29], [1, 0, 19, 3]])], ids=["from 0", "from later"])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2)])
def test_branches_attend_as_one_call_with_a_mask_does(monkeypatch, rows, slots, begin, heads, shared):
    monkeypatch.setitem(packed_attention.ROWS_PER_GROUP, "cpu", rows)
    found = []
    for packed in (True, False):
        query, key, value, *rest = tensors(heads, shared)
        if packed:
            (old, extra) = (rest[0], rest[1]), [(rest[2], rest[3])] if slots else None
            seen = Branches([old], LENGTHS, R, torch.float32, begin, extra)
            out, _ = attend(Layer(heads // shared), query, key, value, None, seen)
        else:
            out = by_mask(query, key, value, *rest, slots, begin, heads // shared)
        wanted = [query, key, value, *rest[: 4 if slots else 2]]
        slope = torch.linspace(-1, 1, out.numel()).view_as(out)
        found.append((out, *torch.autograd.grad(out, wanted, slope)))
    for mine, theirs in zip(*found, strict=True):
        assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_row_that_sees_no_cached_column_sees_its_own():
    query, key, value, *rest = tensors(2, 2)
    seen = Branches([(rest[0], rest[1])], torch.zeros_like(LENGTHS), R, torch.float32)
    out, _ = attend(Layer(1), query, key, value, None, seen)
    assert_close(out[:, 0], value[:, :, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 255, 256, 300, 600])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2)])
def test_causal_attention_by_products(dtype, tokens, heads, shared):
    torch.manual_seed(0)
    query = torch.randn(B, heads, tokens, W).to(dtype)
    key, value = torch.randn(2, B, shared, tokens, W).to(dtype)
    found = products.causal(query, key, value, W**-0.5)
    groups = heads // shared
    exact = (part.double() for part in (query, repeat_kv(key, groups), repeat_kv(value, groups)))
    wanted = F.scaled_dot_product_attention(*exact, is_causal=True)
    assert found.dtype == dtype
    near = 1e-5 if dtype == torch.float32 else 2e-2
    assert_close(found.double(), wanted, rtol=near, atol=near)


@pytest.mark.parametrize(("units", "dtype", "inside"), [("yes", "bfloat16", "bf16"), ("", "bfloat16", "ieee")])
def test_only_products_inside_are_made_of_bf16_factors(monkeypatch, units, dtype, inside):
    monkeypatch.setattr(products, "cpu_bf16_units", lambda: units)
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    with pytest.raises(ZeroDivisionError), products.products_of(getattr(torch, dtype)):
        assert settings.fp32_precision == (inside if inside == "bf16" else before)
        raise ZeroDivisionError
    assert settings.fp32_precision == before
