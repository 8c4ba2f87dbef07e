"""A replay keeps what happened at each refocus."""

import pytest
import torch
from windows import REFOCUSES, K, replayed, scored

from megactx.focus.allocator import FocusAllocator
from megactx.focus.replay import Replay, View


@pytest.fixture(scope="module")
def session():
    return replayed()


def test_a_replay_keeps_scores_edits_and_windows_of_its_row(session):
    replay, windows = session
    assert len(replay.steps) == REFOCUSES and len(replay.views) == REFOCUSES + 1
    for view, context in zip(replay.views, windows, strict=True):
        count = int(context.counts[1])
        assert torch.equal(view.start, context.starts()[1, :count]) and view.tokens == 97
        assert torch.equal(view.width, context.widths()[1, :count])
    for step, before in zip(replay.steps, windows, strict=False):
        assert torch.equal(step.score, scored(before)[1, : len(step.before.lod)])
        assert step.price == 0.25 and len(step.edits) > 0 and set(step.edits.row.tolist()) == {1}


def test_a_replay_makes_the_edits_of_the_allocator_and_returns_them(session):
    _, windows = session
    plain, kept = windows[0].copy(), windows[0].copy()
    expected = FocusAllocator(protected=8).refocus(plain, scored(plain))
    edits = Replay().refocus(FocusAllocator(protected=8), kept, scored(kept))
    assert torch.equal(edits.index, expected.index) and torch.equal(edits.row, expected.row)
    assert torch.equal(kept.lod, plain.lod) and torch.equal(kept.index, plain.index)


def test_what_is_kept_does_not_change_when_the_session_goes_on(session):
    context = session[1][0].copy()
    context.lod = context.lod.clone()
    view, lod = View.of(context, 0), context.lod[0, : int(context.counts[0])].clone()
    context.lod.zero_()
    assert torch.equal(view.lod, lod) and lod.any() and view.block_size == K


def test_a_row_that_is_not_there_is_refused(session):
    context = session[1][0].copy()
    with pytest.raises(ValueError, match="row=2 is not allowed: 0 to 1"):
        Replay(row=2).refocus(FocusAllocator(), context, torch.zeros(context.lod.shape))
