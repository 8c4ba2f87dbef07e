"""With fixed values of all gists the allocator comes to rest, and at the best windows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_windows import NEWEST, K, expandable, make_one_by_one, raw, tree, window

from megactx.focus import moves
from megactx.focus.allocator import FocusAllocator
from megactx.focus.price import price, signed_scores
from megactx.memory import MegaContextTree, WorkingContext

# One value per gist, whatever the working context: what its detail is worth where it stands or where its children do.


def fixed_values(whole: MegaContextTree, kind: str, seed: int) -> torch.Tensor:
    """[levels + 2, B, N]"""
    generator = torch.Generator().manual_seed(seed)
    n = int(whole.counts(1).max()) + 1
    values = torch.zeros(whole.depth + 2, whole.rows, n)
    for lod in range(whole.depth, 0, -1):
        drawn = torch.rand(whole.rows, n, generator=generator)
        if kind == "diminishing":  # never more than the parent's, where there is one
            parent = values[lod + 1][:, torch.arange(n) // K]
            drawn = drawn.sqrt() * torch.where(parent > 0, parent, 1.0)
        elif kind == "rising":
            drawn = drawn * 16.0 ** (whole.depth - lod)
        elif kind == "alike":  # most are worth next to nothing
            drawn = drawn**8
        elif kind == "of either sign":
            drawn = 4 * drawn - 2
        values[lod] = drawn
    return values


def values_of(context: WorkingContext, legal, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    row = torch.arange(len(context.lod))[:, None]
    n = values.shape[2]  # of an index beyond it no value is read
    v_down = values[context.lod, row, context.index % n]
    v_keep = values[context.lod + 1, row, context.index // K % n]
    return torch.where(legal.expand, v_down, 0), torch.where(legal.first >= 0, v_keep, 0)


def settle(context, allocator, values, tau=0.1, calls=400, with_price=True) -> list[int]:
    """Refocus until nothing has come for longer than the cooldown: the number of edits of each call."""
    made = []
    while len(made) < calls and (len(made) <= allocator.cooldown or any(made[-allocator.cooldown - 1 :])):
        legal = moves(context, allocator.protected)
        v_down, v_keep = values_of(context, legal, values)
        free = context.budget - context.lengths
        now = price(v_down, v_keep, legal, free, K, allocator.margin(tau))
        scores = signed_scores(v_down, v_keep, legal, now, tau)
        given_price = now if with_price else None
        checked = make_one_by_one(allocator.propose(context, scores, given_price), context)
        made.append(len(allocator.refocus(context, scores, given_price)))
        assert torch.equal(context.lod, checked.lod) and torch.equal(context.index, checked.index)
    return made


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from([(100,), (150,), (220,)]),
    st.sampled_from(["diminishing", "rising", "alike", "of either sign"]),
    st.sampled_from([0.0, 0.1]),
    st.integers(0, 10**6),
    st.integers(0, 12),
    st.sampled_from([2, 4, 8]),
)
@pytest.mark.slow
def test_with_fixed_values_it_comes_to_rest(lengths, kind, how, seed, spare, most):
    whole = tree(lengths)
    values, context = fixed_values(whole, kind, seed), window(whole, seed, spare)
    allocator = FocusAllocator(temperature=how, max_edits=most, protected=NEWEST, cooldown=seed % 3)
    made = settle(context, allocator, values)
    assert len(made) < 400
    # Edits open the way to others a level further down, so up to one call per level is not full.
    active = len(made) - allocator.cooldown - 1
    assert active <= math.ceil(sum(made) / most) + allocator.cooldown + whole.depth
    legal, margin = moves(context, NEWEST), allocator.margin(0.1)
    v_down, v_keep = values_of(context, legal, values)
    if context.lengths.item() + K - 1 <= context.budget:
        assert not (v_down > margin).any()
    elif kind == "diminishing":  # no swap is left that is worth it
        assert v_down.max() <= torch.where(legal.leads, v_keep, torch.inf).min() + 2 * margin


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**6), st.integers(0, 12), st.sampled_from([2, 4, 8]))
def test_where_no_edit_opens_the_way_to_another_no_call_is_wasted_and_the_result_is_the_best(seed, spare, most):
    whole = tree((150,), 1)
    context, values = window(whole, seed, spare), fixed_values(whole, "alike", seed)
    values[1, 0, [0, *range((150 - NEWEST) // K, 38)]] = -1  # what stays raw in any case

    def opened() -> set[int]:
        return {i // K for i in context.index[(context.lod == 0) & context.mask].tolist() if values[1, 0, i // K] >= 0}

    most_opened = len(opened()) + (context.budget - int(context.counts)) // (K - 1)
    allocator, tau = FocusAllocator(max_edits=most, protected=NEWEST), 1e-3
    made = settle(context, allocator, values, tau)
    assert len(made) - allocator.cooldown - 1 <= math.ceil(sum(made) / most)
    best = values[1, 0].sort(descending=True).values[:most_opened].clamp(min=0).sum()
    got = values[1, 0, sorted(opened())].sum()
    assert got >= best - 2 * allocator.margin(tau) * most_opened


def test_a_collapse_that_nothing_pays_back_would_go_back_and_forth_for_ever():
    """A gist of little worth with children of much: together they are dear, alone it is cheap."""
    whole = tree((36,))
    assert whole.depth == 2
    values = torch.full((4, 1, 10), 100.0)
    values[2, 0, 1], values[1, 0, 4:8] = 1.0, 10.0

    def start():
        context = raw(whole)
        context.collapse(1, torch.arange(4, 8))
        context.budget = int(context.counts)
        return context

    restless = settle(start(), FocusAllocator(protected=0), values, calls=40, with_price=False)
    assert len(restless) == 40 and sum(restless) > 10
    assert not any(settle(start(), FocusAllocator(protected=0), values))


def test_without_a_margin_the_last_swaps_are_never_made():
    """The smallest price is just above the siblings that pay: they are worth too little less than it to go."""
    values = torch.zeros(3, 1, 10)
    values[1, 0] = torch.tensor([0, 0.001, 0.002, 5, 5, 0, 0, 0, 0, 0])
    context = expandable(2, spare=0)  # gists 3 and 4 wait, blocks 1 and 2 could pay
    legal, tau, allocator = moves(context, 0), 0.1, FocusAllocator(protected=0)
    v_down, v_keep = values_of(context, legal, values)
    for margin, count in ((0.0, 0), (allocator.margin(tau), 4)):
        now = price(v_down, v_keep, legal, torch.tensor([0]), K, margin)
        scores = signed_scores(v_down, v_keep, legal, now, tau)
        assert len(allocator.propose(context, scores, now)) == count
