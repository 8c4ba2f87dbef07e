"""Edits are those of two queues taken by hand, the budget holds after each of them, and there is an end to them."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_windows import NEWEST, K, expandable, make_one_by_one, raw, tree, window

from megactx.focus import Edits, moves
from megactx.focus.allocator import REMEMBERED, FocusAllocator
from megactx.memory import WorkingContext


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


lengths = st.sampled_from([(150, 97), (220,), (60, 9, 130), (70, 70)])
cases = given(lengths, st.sampled_from([None, 2]), st.integers(0, 10**6), st.integers(0, 14), st.integers(2, 9))
checked = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_the_same_again_and_after_a_saved_session(temperature):
    def session(turns, context, allocator):
        return [names(allocator.refocus(context, drawn_scores(context, turn))) for turn in turns]

    def fresh():
        return FocusAllocator(temperature=temperature, max_edits=4, protected=NEWEST, seed=3)

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
    other = FocusAllocator(temperature=temperature, max_edits=4, protected=NEWEST, seed=4)
    assert (session(range(9), start.copy(), other) == first + rest) == (temperature == 0)


@checked
@cases
def test_draws_come_from_the_same_queues(lengths, levels, seed, spare, most):
    context = window(tree(lengths, levels), seed, spare)
    scores = drawn_scores(context, seed)
    drawn = FocusAllocator(temperature=0.1, max_edits=most, protected=NEWEST, seed=seed).propose(context, scores)
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
        edits = FocusAllocator(temperature=0.1, max_edits=2, protected=0, seed=seed).propose(context, scores)
        counts[-6:] += torch.bincount(edits.index - int(context.index[0, -6]), minlength=6)
    assert counts.sum() == 600 and counts[-1] == 0
    assert (counts[-6:-1].diff() > 0).all() and counts[-6] > 10


def test_every_refocus_draws_anew_and_nothing_else_does():
    context, allocator = expandable(6, spare=6), FocusAllocator(temperature=0.1, max_edits=2, protected=0)
    scores, seen = (context.lod > 0) * 0.5, set()
    for _ in range(8):
        drawn = names(allocator.propose(context, scores))
        assert names(allocator.propose(context, scores)) == drawn
        seen.add(tuple(drawn))
        allocator.refocus(context, torch.zeros_like(scores))
    assert len(seen) > 3


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
    scores[~context.mask] = bad  # of the padding nothing is read
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
        dict(threshold=1.0),
        dict(threshold=-0.1),
        dict(max_edits=1),
        dict(cooldown=-1),
        dict(protected=-1),
        dict(temperature=-0.1),
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


@pytest.mark.parametrize("cost", [0.0, 20.0, 40.0, 60.0])
@pytest.mark.parametrize("seed", range(6))
def test_edits_are_those_that_bring_most_above_what_reading_again_costs(seed, cost):
    context = window(tree((220, 150)), seed, spare=4)
    scores = drawn_scores(context, seed)
    usual = FocusAllocator(max_edits=6, cooldown=0).propose(context, scores)
    dear = FocusAllocator(max_edits=6, cooldown=0, recompute=cost).propose(context, scores)
    legal = moves(context)
    means = torch.nn.functional.pad(scores, (0, K - 1)).unfold(1, K, 1).mean(-1)

    def net(row: int, chosen: list) -> float:
        """Of edits (gain, column)."""
        if not chosen:
            return 0.0
        count = int(context.counts[row])
        return sum(gain for gain, _ in chosen) - cost / 1000 * (count - min(column for _, column in chosen))

    for row in range(2):
        columns = {}
        for column in range(int(context.counts[row])):
            lod, index = int(context.lod[row, column]), int(context.index[row, column])
            if legal.expand[row, column]:
                columns[row, lod, index, True] = (float(scores[row, column]), column)
            if legal.leads[row, column]:
                columns[row, lod + 1, index // K, False] = (-float(means[row, column]), column)
        mine = [name for name in names(usual) if name[0] == row]
        got = [name for name in names(dear) if name[0] == row]
        assert [name for name in mine if name in got] == got  # some of the usual ones, in their order
        # A collapse that pays for an expand goes with it.
        units = []
        for name in mine:
            if units and not units[-1][-1][3] and name[3]:
                units[-1].append(name)
            else:
                units.append([name])
        best = max(
            net(row, [columns[name] for unit, on in zip(units, choice, strict=True) if on for name in unit])
            for choice in itertools.product([False, True], repeat=len(units))
        )
        assert net(row, [columns[name] for name in got]) == pytest.approx(best, abs=1e-5)
        assert cost > 0 or got == mine


def test_the_dearer_reading_is_the_fewer_edits_are_made_until_there_are_none():
    context, made = window(tree((220, 150)), 3, spare=4), []
    for cost in (0.0, 20.0, 40.0, 1e6):
        made.append(len(FocusAllocator(max_edits=6, recompute=cost).propose(context, drawn_scores(context, 3))))
    assert made == sorted(made, reverse=True) and made[0] > made[2] > made[-1] == 0
