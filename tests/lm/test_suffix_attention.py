"""Rows behind a cache, read without a mask, have the states, keys and values that a dense mask gives them."""

import pytest
import torch
from small_base import FAMILIES, WIDTH, small
from transformers import DynamicCache

from megactx.lm import masks
from megactx.lm.suffix_attention import Run

HELD, ROWS, LAST = 37, 20, 3


def rows(count: int, batch: int = 1):
    positions = torch.arange(count).expand(batch, -1) * 3  # jumps, as between entries of a window
    return torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(count)), positions


def filled(base, x, positions) -> DynamicCache:
    cache = DynamicCache()
    base(x, positions, masks.CAUSAL, cache)
    return cache


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("count", [1, ROWS])
@pytest.mark.parametrize("last", [None, LAST, 1])
@torch.no_grad()
def test_rows_behind_a_cache_are_read_as_a_dense_mask_reads_them(kind, count, last):
    base, (x, positions) = small(kind), rows(HELD + ROWS, batch=2)
    x, positions = x[:, : HELD + count], positions[:, : HELD + count]
    mine, theirs = (filled(base, x[:, :HELD], positions[:, :HELD]) for _ in range(2))
    mask = masks.causal(HELD + count)[:, :, HELD:]
    expected = base(x[:, HELD:], positions[:, HELD:], mask, theirs)
    found = base(x[:, HELD:], positions[:, HELD:], masks.BEHIND, mine, last=last)
    read = slice(-min(last or count, count), None)
    torch.testing.assert_close(found[:, read], expected[:, read], rtol=1e-4, atol=1e-5)
    for one, two in zip(mine.layers, theirs.layers, strict=True):
        torch.testing.assert_close(one.keys, two.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.values, two.values, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_behind_an_empty_cache_are_a_plain_causal_pass():
    base, (x, positions) = small(), rows(ROWS)
    expected = base(x, positions, masks.CAUSAL)
    found = base(x, positions, masks.BEHIND, DynamicCache())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_runs_of_any_lengths_are_read_as_each_alone_behind_its_columns(kind):
    base, (x, positions) = small(kind), rows(HELD, batch=2)
    cache = filled(base, x, positions)
    kv_cache = tuple((layer.keys, layer.values) for layer in cache.layers)
    lengths, cached, documents = (12, 2, 9), (30, 0, 17), (1, 0, 1)
    own = [rows(length) for length in lengths]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    runs = [Run(e - n, e, c, d) for e, n, c, d in zip(ends, lengths, cached, documents, strict=True)]
    found = base.forward_runs(
        torch.cat([x for x, _ in own], 1), torch.cat([p for _, p in own], 1), kv_cache, runs, last=LAST
    )
    for run, (alone, at), before, document in zip(runs, own, cached, documents, strict=True):
        part = tuple((k[document : document + 1], v[document : document + 1]) for k, v in kv_cache)
        expected = base.forward_branches(alone[:, None], at[:, None], part, torch.tensor([[before]]))[0, 0]
        torch.testing.assert_close(found[0, run.read(LAST)], expected[-LAST:], rtol=1e-4, atol=1e-5)
