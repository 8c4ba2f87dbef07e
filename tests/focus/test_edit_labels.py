"""Measured values of edits are those of making each edit and reading everything anew."""

import pytest
import torch
import torch.nn.functional as F
from windows import BASES, following, small_base, tree_of, window

from megactx.focus import moves
from megactx.focus.edit_labels import LONG, ROWS, continuation_nll, measure_values


@torch.no_grad()
def plain_nll(base, context, ids):
    """Each row on its own: a fresh pass over all of its entries and the tokens behind them. -> [B, H]"""
    out = []
    spread = context.tree.encoder.spread
    for row, length in enumerate(context.lengths.tolist()):
        end, after = int(context.ends()[row]), ids[row : row + 1, :-1]
        x = torch.cat([context.to_tensor()[row : row + 1, :length], base.embed(after)], 1)
        behind = torch.arange(end, end + after.shape[1])
        positions = torch.cat([context.positions()[row, :length], behind])[None]
        sigma = spread(context.lods()[row : row + 1, :length])
        sigma = None if sigma is None else F.pad(sigma, (0, after.shape[1]))
        hidden = base.read(x, positions, torch.tensor([x.shape[1]]), sigma)[0, length - 1 :]
        out.append(F.cross_entropy(base.logits(hidden), ids[row], reduction="none"))
    return torch.stack(out)


@pytest.mark.parametrize("rows", [40, 2048])
@pytest.mark.parametrize(("kind", "mode"), [(kind, "plain") for kind in BASES] + [("llama", "damped")])
def test_every_edit_is_worth_what_a_fresh_pass_over_the_edited_window_says(kind, mode, rows, monkeypatch):
    monkeypatch.setitem(ROWS, "cpu", rows)
    base = small_base(kind)
    tree = tree_of(base, gaussian_rope=mode)
    context, ids = window(tree), following(2, 5)
    edits = moves(context, 8).edits(context)
    assert edits.expand.any() and (~edits.expand).any() and edits.lod.max() > 1 and set(edits.row.tolist()) == {0, 1}
    values, plain = measure_values(base, context, edits, ids)
    before = plain_nll(base, context, ids)
    torch.testing.assert_close(continuation_nll(base, context, ids), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain, before.mean(1), rtol=1e-4, atol=1e-4)
    for n in range(len(edits)):
        edited = context.copy()
        edits[n : n + 1].apply(edited)
        change = (before - plain_nll(base, edited, ids)).mean(1)[edits.row[n]]
        expected = change if edits.expand[n] else -change
        torch.testing.assert_close(values[n], expected, rtol=1e-4, atol=1e-4)
    assert values.abs().max() > 1e-3, "the base does not react to what is edited"


@pytest.mark.parametrize(("kind", "mode"), [(kind, "plain") for kind in BASES] + [("llama", "damped")])
@pytest.mark.parametrize("rows", [20, 10**9])
def test_long_branches_are_worth_what_short_ones_of_the_same_edits_are(kind, mode, rows, monkeypatch):
    base = small_base(kind)
    context, ids = window(tree_of(base, gaussian_rope=mode)), following(2, 5)
    edits = moves(context, 8).edits(context)
    edits = edits[torch.randperm(len(edits), generator=torch.Generator().manual_seed(0))]
    monkeypatch.setattr("megactx.focus.edit_labels.RUNS", rows)
    found = []
    for least in (0, 30, 10**9):
        monkeypatch.setitem(LONG, "cpu", least)
        found.append(measure_values(base, context, edits, ids)[0])
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], found[2], rtol=1e-4, atol=1e-5)


def test_some_edits_in_any_order_are_worth_what_they_are_among_all():
    base = small_base()
    context, ids = window(tree_of(base)), following(2, 3)
    edits = moves(context, 8).edits(context)
    every, _ = measure_values(base, context, edits, ids)
    some = torch.randperm(len(edits), generator=torch.Generator().manual_seed(0))[:7]
    torch.testing.assert_close(measure_values(base, context, edits[some], ids)[0], every[some], rtol=1e-4, atol=1e-5)


def test_a_horizon_of_one_and_no_edits_at_all():
    base = small_base()
    context, ids = window(tree_of(base)), following(2, 1)
    edits = moves(context, 8).edits(context)
    values, plain = measure_values(base, context, edits[:0], ids)
    assert values.shape == (0,) and plain.shape == (2,)
    one, _ = measure_values(base, context, edits[-1:], ids)
    edited = context.copy()
    edits[-1:].apply(edited)
    row = edits.row[-1]
    change = (plain_nll(base, context, ids) - plain_nll(base, edited, ids)).mean(1)[row]
    torch.testing.assert_close(one[0], change if edits.expand[-1] else -change, rtol=1e-4, atol=1e-5)


def test_the_window_is_left_as_it_was():
    base = small_base()
    context = window(tree_of(base))
    before = context.lod.clone(), context.index.clone(), context.counts.clone()
    measure_values(base, context, moves(context, 8).edits(context), following(2, 3))
    assert all(torch.equal(a, b) for a, b in zip(before, (context.lod, context.index, context.counts), strict=True))


@pytest.mark.parametrize("shape", [(1, 3), (2, 0), (2,)])
def test_tokens_that_do_not_belong_to_the_rows_are_refused(shape):
    base = small_base()
    context = window(tree_of(base))
    with pytest.raises(ValueError, match=r"following has shape .* expected \[2, H\]"):
        continuation_nll(base, context, torch.zeros(shape, dtype=torch.long))
