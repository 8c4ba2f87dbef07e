"""Edits are those of two queues taken by hand, the budget holds after each of them, and there is an end to them."""

import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megactx.focus import Edits, moves
from megactx.focus.allocator import REMEMBERED, FocusAllocator
from megactx.focus.price import price, signed_scores
from megactx.memory import MegaContextTree, WorkingContext

K = 4
NEWEST = 8  # protected


class Mean:
    block_size, width = K, 2

    def encode_span(self, children):
        return children.mean(1)

    def offset_in(self, tokens):
        return tokens - 1


@cache
def tree(lengths: tuple[int, ...], levels: int | None = None) -> MegaContextTree:
    table = torch.nn.Embedding(20, 2).requires_grad_(False)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    return MegaContextTree.from_tokens(ids, Mean(), table, torch.tensor(lengths), max_level=levels)


def raw(tree: MegaContextTree, debug: bool = False) -> WorkingContext:
    index = torch.arange(int(tree.lengths.max())).expand(tree.rows, -1)
    index = torch.where(index < tree.lengths[:, None], index, 0)
    return WorkingContext(tree, torch.zeros_like(index), index, tree.lengths, 10**6, debug)


def window(tree: MegaContextTree, seed: int, spare: int = 0) -> WorkingContext:
    """A random one: coarser for some rounds, then some gists are opened again; the fullest row has ``spare`` free."""
    context, generator = raw(tree), torch.Generator().manual_seed(seed)
    for share in (0.8, 0.7, 0.5):
        edits = moves(context, NEWEST).edits(context)
        drawn = torch.rand(len(edits), generator=generator)
        edits = edits[~edits.expand & (drawn < share)]
        context.collapse(edits.lod, edits.index, edits.row)
    row, column = ((context.lod > 0) & (torch.rand(context.lod.shape, generator=generator) < 0.2)).nonzero().unbind(1)
    context.expand(column, row)
    context.budget, context.debug = int(context.counts.max()) + spare, True
    return context


def drawn_scores(context: WorkingContext, seed: int) -> torch.Tensor:
    """Eighths, so that many are equal and means are exact; entries of one block lean the same way."""
    generator = torch.Generator().manual_seed(seed)
    b, w = context.lod.shape
    lean = torch.randint(-6, 5, (b, w), generator=generator).gather(1, context.index // K % w)
    return (lean + torch.randint(-2, 3, (b, w), generator=generator)) / 8


def names(edits: Edits) -> list[tuple[int, int, int, bool]]:
    return list(zip(*(t.tolist() for t in (edits.row, edits.lod, edits.index, edits.expand)), strict=True))


def by_hand(context, scores, allocator, free, tired) -> list[tuple[int, int, int, bool]]:
    """What method 11 says, one row and one edit after the other; ``free``: rows where lone collapses are allowed."""
    legal, out = moves(context, allocator.protected), []
    most = allocator.max_edits or max(4, context.budget // 512)
    for row, count in enumerate(context.counts.tolist()):
        score, lods, indices = (t[row].tolist() for t in (scores, context.lod, context.index))
        wanted, spared = [], []
        for column in legal.expand[row].nonzero().flatten().tolist():
            gist = (row, lods[column], indices[column])
            if score[column] > allocator.threshold and gist not in tired:
                wanted.append((-score[column], -column, (*gist, True)))
        asked = {-column for _, column, _ in wanted}
        for column in legal.leads[row].nonzero().flatten().tolist():
            gist, mean = (row, lods[column] + 1, indices[column] // K), sum(score[column : column + K]) / K
            if mean < -allocator.threshold and gist not in tired and not asked & set(range(column, column + K)):
                spared.append((mean, column, (*gist, False)))
        wanted, spared = sorted(wanted), sorted(spared)
        room, made = context.budget - count, 0
        while made < most:
            if wanted and room >= K - 1:
                out.append(wanted.pop(0)[2])
                room -= K - 1
            elif spared and (free[row] or wanted and made + 2 <= most):
                out.append(spared.pop(0)[2])
                room += K - 1
            else:
                break
            made += 1
    return out


def make_one_by_one(edits: Edits, context: WorkingContext) -> WorkingContext:
    """On a copy, which checks its budget and the eight invariants after each."""
    context = context.copy()
    for at in range(len(edits)):
        edits[at : at + 1].apply(context)
    return context


lengths = st.sampled_from([(150, 97), (220,), (60, 9, 130), (70, 70)])
cases = given(lengths, st.sampled_from([None, 2]), st.integers(0, 10**6), st.integers(0, 14), st.integers(2, 9))
checked = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@checked
@cases
def test_edits_are_those_of_two_queues_taken_by_hand(lengths, levels, seed, spare, most):
    context = window(tree(lengths, levels), seed, spare)
    allocator = FocusAllocator(max_edits=most if seed % 3 else None, protected=NEWEST + seed % 2 * 5)
    tired = set()
    for turn in range(3):
        scores, p = drawn_scores(context, seed + turn), torch.tensor([1.0, 0.0, 0.5])[: len(lengths)]
        for given_price, free in ((None, [True] * 3), (p, [False, True, False])):
            edits = allocator.propose(context, scores, given_price)
            assert names(edits) == by_hand(context, scores, allocator, free, tired)
        assert set(names(edits)) <= set(names(moves(context, allocator.protected).edits(context)))
        edited = make_one_by_one(edits, context)
        made = allocator.refocus(context, scores, p)
        assert names(made) == names(edits) and torch.equal(context.lod, edited.lod)
        tired |= {name[:3] for name in names(made)}  # three refocuses are no more than the cooldown


@checked
@cases
def test_a_gist_that_was_edited_stays_for_the_cooldown(lengths, levels, seed, spare, most):
    context, cooldown = window(tree(lengths, levels), seed, spare), seed % 4
    allocator, last = FocusAllocator(max_edits=most, cooldown=cooldown, protected=NEWEST), {}
    for turn in range(7):
        edits = allocator.refocus(context, drawn_scores(context, turn))
        ages = [turn - last[name[:3]] if name[:3] in last else REMEMBERED for name in names(edits)]
        assert not ages or min(ages) > cooldown
        for row in range(len(lengths)):
            mine = [age for age, edited in zip(ages, edits.row.tolist(), strict=True) if edited == row]
            told = allocator.telemetry.residency[row].item()
            assert math.isnan(told) if not mine else told == pytest.approx(sum(mine) / len(mine))
        last |= {name[:3]: turn for name in names(edits)}


@checked
@cases
def test_rows_do_not_know_of_each_other(lengths, levels, seed, spare, most):
    whole = tree(lengths, levels)
    context, allocator = window(whole, seed, spare), FocusAllocator(max_edits=most, protected=NEWEST)
    before = context.copy()
    scores = drawn_scores(context, seed)
    together = allocator.refocus(context, scores)
    after = names(allocator.propose(context, drawn_scores(context, seed + 1)))
    for row, length in enumerate(lengths):
        count = before.counts[row : row + 1]
        alone = tree((length,), levels)
        part = (before.lod[row : row + 1, : int(count)], before.index[row : row + 1, : int(count)], count)
        one, single = WorkingContext(alone, *part, before.budget), FocusAllocator(max_edits=most, protected=NEWEST)
        made = single.refocus(one, scores[row : row + 1, : int(count)])
        assert names(made) == [(0, *name[1:]) for name in names(together) if name[0] == row]
        again = single.propose(one, drawn_scores(context, seed + 1)[row : row + 1, : one.lod.shape[1]])
        assert names(again) == [(0, *name[1:]) for name in after if name[0] == row]


@pytest.mark.parametrize("kind", ["greedy", "stochastic"])
def test_the_same_again_and_after_a_saved_session(kind):
    def session(turns, context, allocator):
        return [names(allocator.refocus(context, drawn_scores(context, turn))) for turn in turns]

    def fresh():
        return FocusAllocator(kind, max_edits=4, protected=NEWEST, seed=3)

    start = window(tree((150, 97)), 5, spare=7)
    context, allocator = start.copy(), fresh()
    first = session(range(4), context, allocator)
    state, saved = allocator.state_dict(), context.copy()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    rest = session(range(4, 9), context, allocator)
    assert sum(map(len, first + rest)) > 30
    resumed = fresh()
    resumed.load_state_dict(state)
    assert session(range(4, 9), saved, resumed) == rest
    assert session(range(9), start.copy(), fresh()) == first + rest
    other = FocusAllocator(kind, max_edits=4, protected=NEWEST, seed=4)
    assert (session(range(9), start.copy(), other) == first + rest) == (kind == "greedy")


@checked
@cases
def test_draws_come_from_the_same_queues(lengths, levels, seed, spare, most):
    context = window(tree(lengths, levels), seed, spare)
    scores = drawn_scores(context, seed)
    drawn = FocusAllocator("stochastic", max_edits=most, protected=NEWEST, seed=seed).propose(context, scores)
    make_one_by_one(drawn, context)
    assert len(drawn) == len(FocusAllocator(max_edits=most, protected=NEWEST).propose(context, scores))
    context.budget = 10**6  # room for all: then the queues are emptied
    queues = FocusAllocator(max_edits=1000, protected=NEWEST).propose(context, scores)
    assert set(names(drawn)) <= set(names(queues))


def test_the_better_an_edit_the_more_often_it_is_drawn():
    context = expandable(6, spare=6)
    scores = torch.zeros(context.lod.shape)
    scores[0, -6:] = torch.tensor([0.25, 0.3, 0.35, 0.4, 0.45, 0.1])
    counts = torch.zeros(context.lod.shape[1])
    for seed in range(300):
        edits = FocusAllocator("stochastic", max_edits=2, protected=0, seed=seed).propose(context, scores)
        counts[-6:] += torch.bincount(edits.index - int(context.index[0, -6]), minlength=6)
    assert counts.sum() == 600 and counts[-1] == 0
    assert (counts[-6:-1].diff() > 0).all() and counts[-6] > 10


def test_every_refocus_draws_anew_and_nothing_else_does():
    context, allocator = expandable(6, spare=6), FocusAllocator("stochastic", max_edits=2, protected=0)
    scores, seen = (context.lod > 0) * 0.5, set()
    for _ in range(8):
        drawn = names(allocator.propose(context, scores))
        assert names(allocator.propose(context, scores)) == drawn
        seen.add(tuple(drawn))
        allocator.refocus(context, torch.zeros_like(scores))
    assert len(seen) > 3


def expandable(count: int, spare: int) -> WorkingContext:
    """One row, the last ``count`` entries of which are gists, all else is raw."""
    length = (count + 3) * K
    context = raw(tree((length,), 1))
    context.collapse(1, torch.arange(3, count + 3))
    context.budget, context.debug = int(context.counts) + spare, True
    return context


def test_at_a_full_budget_an_expand_waits_for_the_collapse_that_pays_for_it():
    context, allocator = expandable(4, spare=0), FocusAllocator(protected=0)
    scores = torch.zeros(context.lod.shape)
    scores[0, -4:] = torch.tensor([0.9, 0.3, 0.5, 0.1])
    scores[0, 4:12] = torch.tensor([-0.3] * 4 + [-0.8] * 4)
    expected = [(0, 1, 2, False), (0, 1, 3, True), (0, 1, 1, False), (0, 1, 5, True)]
    edits = allocator.refocus(context, scores, torch.tensor([0.5]))
    assert names(edits) == expected
    assert context.lengths.item() == context.budget


def test_a_collapse_that_no_expand_waits_for_is_made_where_detail_costs_nothing():
    context, allocator = expandable(4, spare=0), FocusAllocator(protected=0)
    scores = torch.zeros(context.lod.shape)
    scores[0, 8:12] = -0.8
    for p in (None, torch.tensor([0.0])):
        assert names(allocator.propose(context, scores, p)) == [(0, 1, 2, False)]
    assert len(allocator.propose(context, scores, torch.tensor([0.5]))) == 0


def test_equals_are_expanded_near_the_cursor_and_collapsed_far_from_it():
    context = expandable(5, spare=7)
    scores = torch.zeros(context.lod.shape)
    scores[0, -5:], scores[0, :-5] = 0.5, -0.5
    edits = FocusAllocator(protected=0, max_edits=7).propose(context, scores)
    assert [n[1:] for n in names(edits)] == [
        *[(1, 7, True), (1, 6, True)],
        *[(1, 1, False), (1, 5, True), (1, 2, False), (1, 4, True)],
    ]


def test_an_entry_that_wants_detail_keeps_its_siblings():
    context = expandable(5, spare=3)  # gists 3 to 7, of which 4 to 7 are siblings
    two = tree((32,), 2)
    context = WorkingContext(two, context.lod, context.index, context.counts, context.budget, debug=True)
    scores = torch.zeros(context.lod.shape)
    scores[0, -4:] = torch.tensor([-0.9, -0.9, 0.3, -0.9])
    assert names(FocusAllocator(protected=0).propose(context, scores)) == [(0, 1, 6, True)]
    scores[0, -2] = 0.1
    assert names(FocusAllocator(protected=0).propose(context, scores)) == [(0, 2, 1, False)]


def test_nothing_happens_where_nothing_is_legal_or_wanted():
    allocator = FocusAllocator()
    for context in (window(tree((150, 97)), 1, 9), raw(tree((3, 2))), raw(tree((7,)))):
        empty = torch.zeros(context.lod.shape)
        before = context.lod.clone()
        assert len(allocator.refocus(context, empty)) == 0 and torch.equal(context.lod, before)
        assert allocator.telemetry.swap_rate.tolist() == [0.0] * len(before)
    context = raw(tree((150, 97)))
    assert len(FocusAllocator(protected=150).propose(context, -torch.ones(context.lod.shape))) == 0
    assert len(FocusAllocator(protected=0).propose(context, torch.ones(context.lod.shape))) == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_no_numbers_are_refused(bad):
    context = window(tree((150, 60)), 0)
    scores = torch.zeros(context.lod.shape)
    scores[~context.there] = bad  # of the padding nothing is read
    allocator = FocusAllocator()
    allocator.refocus(context, scores)
    scores[1, 0] = bad
    with pytest.raises(ValueError, match="scores: NaN or infinite"):
        allocator.refocus(context, scores)
    with pytest.raises(ValueError, match="scores have shape"):
        allocator.refocus(context, scores[:, 1:])
    assert allocator.refocuses == 1


@pytest.mark.parametrize(
    "wrong",
    [
        dict(kind="best"),
        dict(threshold=1.0),
        dict(threshold=-0.1),
        dict(max_edits=1),
        dict(cooldown=-1),
        dict(protected=-1),
        dict(temperature=0.0),
    ],
)
def test_a_setting_that_is_not_allowed_is_named(wrong):
    with pytest.raises(ValueError, match=f"allocator.{next(iter(wrong))}={next(iter(wrong.values()))}"):
        FocusAllocator(**wrong)


def test_telemetry_tells_what_was_done():
    context, allocator = expandable(4, spare=5), FocusAllocator(protected=0)
    scores = torch.zeros(context.lod.shape)
    scores[0, -4:], scores[0, 8:12] = 0.5, -0.5
    count, p = int(context.counts), torch.tensor([0.25])
    allocator.refocus(context, scores, p)
    told = allocator.telemetry
    assert (told.expands.tolist(), told.collapses.tolist()) == ([2], [1])
    assert told.swap_rate.tolist() == [3 * K / count]
    assert told.utilisation.item() == pytest.approx((count + K - 1) / context.budget)
    assert told.residency.tolist() == [REMEMBERED] and told.price is p


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
    st.sampled_from(["greedy", "stochastic"]),
    st.integers(0, 10**6),
    st.integers(0, 12),
    st.sampled_from([2, 4, 8]),
)
def test_with_fixed_values_it_comes_to_rest(lengths, kind, how, seed, spare, most):
    whole = tree(lengths)
    values, context = fixed_values(whole, kind, seed), window(whole, seed, spare)
    allocator = FocusAllocator(how, max_edits=most, protected=NEWEST, cooldown=seed % 3)
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


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**6), st.integers(0, 12), st.sampled_from([2, 4, 8]))
def test_where_no_edit_opens_the_way_to_another_no_call_is_wasted_and_the_result_is_the_best(seed, spare, most):
    whole = tree((150,), 1)
    context, values = window(whole, seed, spare), fixed_values(whole, "alike", seed)
    values[1, 0, [0, *range((150 - NEWEST) // K, 38)]] = -1  # what stays raw in any case

    def opened() -> set[int]:
        return {i // K for i in context.index[(context.lod == 0) & context.there].tolist() if values[1, 0, i // K] >= 0}

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
