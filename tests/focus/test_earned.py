"""What is read is never worse than the newest tokens, by LensNet's own estimate."""

import pytest
import torch
from small_windows import NEWEST, K, tree, window

from megactx.focus import moves
from megactx.focus.earned import Found, earned, newest_from
from megactx.focus.lensnet import Scores
from megactx.memory import Selection

BUDGET, MARGIN = 40, 0.05


def scores_of(context, legal, seed, worth=1.0):
    """Random values of what is legal, one per set of siblings."""
    drawn = torch.rand(2, *context.lod.shape, generator=torch.Generator().manual_seed(seed)) * worth - 0.3 * worth
    keep = torch.where(legal.first >= 0, drawn[1].gather(1, legal.first.clamp(min=0)), 0.0)
    nothing = torch.zeros(len(context.lod))
    return Scores(torch.where(legal.expand, drawn[0], 0.0), keep, nothing, drawn[0])


def tokens_of(selection, row):
    """Which tokens are read, in their order; those of a gist by its span."""
    out = []
    for start, width in zip(selection.starts()[row].tolist(), selection.widths()[row].tolist(), strict=True):
        out.append(range(start, start + width))
    return out[: int(selection.counts[row])]


def newest_of(context, row):
    end = int(context.ends()[row])
    return [*range(K), *range(max(K, end - (BUDGET - K)), end)]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_read_is_never_worth_less_than_the_newest_tokens_by_the_estimate(seed):
    context = window(tree((300, 211)), seed)
    legal = moves(context, NEWEST)
    scores = scores_of(context, legal, seed)
    shown, count, _ = earned(context, BUDGET, legal, scores, MARGIN, NEWEST)
    assert isinstance(shown, Selection) and (shown.counts <= BUDGET).all()
    for row in range(2):
        end = int(context.ends()[row])
        spans = tokens_of(shown, row)
        newest, sets = newest_of(context, row), int(count[row]) // K
        begin = newest[K] + sets * K
        assert [span[0] for span in spans[:K]] == [*range(K)]
        assert [span[0] for span in spans[K + sets * K :]] == [*range(begin, end)] and end - begin >= NEWEST
        bought = [spans[K + n * K] for n in range(sets)]
        starts = context.starts()[row].tolist()
        gained = [float(scores.v_keep[row, starts.index(span[0])]) for span in bought]
        paid = []
        for chunk in range(sets):
            low, high, most = newest[K] + chunk * K, newest[K] + (chunk + 1) * K, 0.0
            for column in range(int(context.counts[row])):
                first, last = starts[column], starts[column] + int(context.widths()[row, column])
                if first < high and last > low:
                    raw = context.lod[row, column] == 0
                    most = max(most, float((scores.v_keep if raw else scores.v_down)[row, column]))
            paid.append(most)
        assert sum(gained) >= sum(paid) + MARGIN * sets
        for worth, cost in zip(sorted(gained, reverse=True), paid, strict=True):
            assert worth > cost + MARGIN


def test_with_nothing_to_gain_what_is_read_is_the_sink_and_the_newest_tokens():
    context = window(tree((300, 211)), 3)
    legal = moves(context, NEWEST)
    for scores in (None, scores_of(context, legal, 0, worth=0.0)):
        shown, count, _ = earned(context, BUDGET, legal, scores, MARGIN, NEWEST)
        assert count.tolist() == [0, 0] and (shown.lod == 0).all()
        for row in range(2):
            assert shown.index[row, : int(shown.counts[row])].tolist() == newest_of(context, row)


def test_an_old_block_that_is_worth_more_stands_in_the_place_of_the_oldest_of_the_newest_tokens():
    context = window(tree((300,)), 1)
    legal = moves(context, NEWEST)
    old = [
        c for c in legal.leads[0].nonzero()[:, 0].tolist() if context.lod[0, c] == 0 and context.starts()[0, c] < 200
    ]
    keep = torch.zeros(context.lod.shape)
    keep[0, old[0] : old[0] + K] = 1.0
    scores = Scores(torch.zeros_like(keep), keep, torch.zeros(1), keep)
    shown, count, _ = earned(context, BUDGET, legal, scores, MARGIN, NEWEST)
    block = int(context.index[0, old[0]])
    assert int(count) == K
    assert shown.index[0].tolist() == [*range(K), *range(block, block + K), *range(300 - BUDGET + 2 * K, 300)]


def test_a_text_that_fits_is_read_whole():
    context = window(tree((30,)), 0)
    legal = moves(context, NEWEST)
    shown, _, _ = earned(context, BUDGET, legal, scores_of(context, legal, 0), MARGIN, NEWEST)
    assert shown.index[0].tolist() == [*range(30)]


def test_a_selection_refuses_entries_that_overlap():
    with pytest.raises(ValueError, match="begins before the one to its left has ended"):
        Selection(tree((300,)), torch.tensor([[0, 1]]), torch.tensor([[9, 2]]), torch.tensor([2]), 8)


@pytest.mark.parametrize("seed", range(6))
def test_found_blocks_are_read_in_place_of_the_oldest_of_the_newest_tokens_and_nothing_is_read_twice(seed):
    context = window(tree((300, 211)), seed)
    legal = moves(context, NEWEST)
    found = Found(
        [[9, 3, 4, 70, 0], [20]], [9, 9], [None, None]
    )  # of row 0 block 70 is among the newest tokens, and block 0 is the sink
    shown, count, _ = earned(context, BUDGET, legal, scores_of(context, legal, seed), MARGIN, NEWEST, found)
    assert (count >= torch.tensor([3 * K, K])).all() and shown.counts.tolist() == [BUDGET] * 2
    for row, blocks in ((0, (9, 3, 4)), (1, (20,))):
        raw = {*shown.index[row][shown.lod[row] == 0].tolist()}
        assert all({*range(block * K, block * K + K)} <= raw for block in blocks)
        end = int(context.ends()[row])
        assert {*range(end - NEWEST, end)} <= raw


@pytest.mark.parametrize("newest", [None, 2 * K])
@pytest.mark.parametrize("length", [14, 30, 44, 60])
def test_found_blocks_take_room_that_nobody_has_before_they_take_that_of_the_newest_tokens(length, newest):
    context = window(tree((length,)), 0)
    legal = moves(context, NEWEST)
    shown, _, opened = earned(context, BUDGET, legal, None, MARGIN, 3 * K, Found([[1, 2]], [9], [newest]))
    read = shown.index[0, : int(shown.counts)].tolist()
    assert {*range(K, 3 * K)} <= {*read} and len(read) == len({*read}) <= BUDGET
    assert (opened[0] != []) == (length > 40 or newest is not None and length - newest > K)
    if newest is None:
        assert len(read) == min(length, BUDGET)


@pytest.mark.parametrize("newest", [None, 0, 5, 2 * K, 30])
@pytest.mark.parametrize("seed", range(40))
def test_found_blocks_stay_where_the_newest_tokens_give_way_to_them(seed, newest):
    """By a slow reference: blocks are taken in their order as long as all of the taken and the newest tokens fit. Where
    few of the newest are to be read these begin where they do, maybe in a found block, and nothing else is earned."""
    context = window(tree((300,)), seed)
    legal = moves(context, NEWEST)
    scores = None if seed % 2 else scores_of(context, legal, seed)
    draw = torch.Generator().manual_seed(seed)
    found, most = torch.randperm(300 // K, generator=draw).tolist(), int(torch.randint(0, 9, (1,), generator=draw))
    begin = int(newest_from(context, BUDGET))
    few = 0 if newest is None else 300 - newest
    held = Found([found], [most], [newest])
    shown, count, opened = earned(context, BUDGET, legal, scores, MARGIN, NEWEST, held)
    taken, start = [], max(begin, few)
    for block in found[:]:
        if block == 0:
            continue
        for paid in range(len(taken) + 2):  # the fewest that pay for all that is left of what they leave
            left = [at for at in [*taken, block] if at * K < max(begin + paid * K, few)]
            if len(left) == paid:
                break
        if paid <= most and begin + paid * K <= max(300 - NEWEST, few):
            taken, start = [*taken, block], max(begin + paid * K, few)
    if not taken:
        few, start = 0, begin
    old = [at for at in taken if at * K < start]
    assert sorted(opened[0]) == sorted(old) and len(old) <= most
    read = shown.index[0][shown.lod[0] == 0].tolist()
    assert {at * K + n for at in taken for n in range(K)} <= {*read} and len(read) == len({*read})
    assert {*range(start if few > begin else 300 - NEWEST, 300)} <= {*read} and shown.counts.tolist() <= [BUDGET]
    if few <= begin:
        assert shown.counts.tolist() == [BUDGET] and int(count) >= K * len(old)
    else:
        assert sorted(read) == sorted({*range(K), *range(start, 300), *(at * K + n for at in old for n in range(K))})
        assert int(count) == K * len(old) and (shown.lod[0, : int(shown.counts)] == 0).all()
