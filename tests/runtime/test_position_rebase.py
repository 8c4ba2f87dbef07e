"""Positions stay below the limit at any length, ascend, and move only when they must."""

import pytest
import torch
from windows import small_base, tree_of, window

from megactx.gist import GistNet
from megactx.lm import BaseLM
from megactx.memory import WorkingContext
from megactx.runtime import Controller, Models, Settings
from megactx.runtime.position_rebase import PositionRebase
from megactx.runtime.settings import note_on, tail

LIMIT, BUDGET, STEP = 200, 90, 4


def grown(tree, context, count):
    tree.append(torch.randint(97, (tree.rows, count)))
    context.append(count)
    return context


def test_positions_are_absolute_until_new_tokens_would_leave_the_trained_range():
    tree = tree_of(small_base(), lengths=(150,))
    context, rebase = window(tree, edits=0), PositionRebase("rebased", LIMIT, BUDGET, STEP)
    positions, behind = rebase.place(context)
    assert torch.equal(positions, context.positions()) and behind.tolist() == [150]
    assert rebase.moved == [None]


def test_beyond_it_they_stay_below_the_limit_and_move_once_in_many_refocuses():
    tree = tree_of(small_base(), lengths=(150, 97))
    context, rebase = WorkingContext.recency(tree, BUDGET), PositionRebase("rebased", LIMIT, BUDGET, STEP)
    moved, before, mask = 0, None, None
    for _ in range(70):
        if int(context.counts.max()) > BUDGET - STEP:
            context = WorkingContext.recency(tree, BUDGET - 20)
            context.budget, before = BUDGET, None
        context = grown(tree, context, STEP)
        positions, behind = rebase.place(context)
        ends = context.ends()
        for row, count in enumerate(context.counts.tolist()):
            own = positions[row, :count]
            assert (own[1:] > own[:-1]).all() and own[:4].tolist() == [0, 1, 2, 3]
            assert int(behind[row]) > int(own[-1]) and int(behind[row]) + STEP <= LIMIT
            assert int(own[-1]) == int(behind[row]) - 1 or ends[row] <= LIMIT
        if before is not None:
            moved += not torch.equal(before, torch.where(mask, positions[:, : before.shape[1]], 0))
        before, mask = positions, context.mask
    assert 0 < moved < 20


def test_absolute_positions_go_on_beyond_the_limit():
    tree = tree_of(small_base(), lengths=(300,))
    context = window(tree, edits=0)
    positions, behind = PositionRebase("absolute", LIMIT, BUDGET, STEP).place(context)
    assert torch.equal(positions, context.positions()) and behind.tolist() == [300]


def test_absolute_positions_warn_once_when_they_pass_the_trained_range(caplog):
    rebase = PositionRebase("absolute", 100, 64, 4)
    rebase.moved = [None]
    for tokens in (50, 96, 97, 200):
        assert rebase._below(0, tokens) is None
        assert len(caplog.records) == (tokens > 96)


def test_a_base_with_few_positions_is_told_what_sessions_need_in_one_sentence():
    with pytest.raises(ValueError, match="256 positions, sessions .* need at least .*megacontext=none") as told:
        Settings(budget=128).check(32, 256)
    assert "budget" not in str(told.value)


def test_a_base_of_512_positions_has_sessions_with_a_smaller_protected_tail():
    assert [tail(32, limit) for limit in (2048, 567, 566, 512, 457, 100)] == [128, 128, 96, 64, 32, 32]
    for budget in (431, 448):
        own = Settings(budget=budget).fitted(32, 512)
        own.check(32, 512)
        assert own.protected == 64
    assert Settings().fitted(32, 567) == Settings() and Settings(positions="absolute").fitted(32, 512).protected == 128
    assert Settings(allocator={"protected": 120}).fitted(32, 512).protected == 120  # somebody has set it
    assert "newest 64 tokens stay in detail, not 128" in note_on(32, 512) and note_on(32, 567) == ""
    assert "256 positions, sessions" in note_on(32, 256)


def test_a_session_of_a_base_with_few_positions_runs_past_them_and_stays_within(models, ids):
    base = models.base  # of 512 positions
    torch.manual_seed(0)
    gistnet = GistNet(base.width, base.embedding_rms(), block_size=32, num_heads=4).eval().requires_grad_(False)
    controller = Controller(Models(base, gistnet, None, "small"), Settings(budget=448, megacontext="recency"))
    assert controller.settings.protected == 64 and "newest 64 tokens" in controller.notes[0]
    stream = controller.stream()
    stream.append(ids(1, 1500))
    assert torch.isfinite(stream.logits()).all()
    positions, behind = stream.rebase.place(stream.context)
    assert int(positions.max()) < 512 and int(behind.max()) < 512


def test_absolute_positions_are_refused_for_a_base_with_a_table_of_them(models):
    config = dict(model_type="gpt2", vocab_size=512, n_embd=32, n_layer=1, n_head=2, n_positions=512)
    base = BaseLM.from_config(config).freeze()
    assert base.learned_positions() and not models.base.learned_positions()
    own = Models(base, models.gistnet, None, "gpt2")
    settings = dict(budget=96, allocator={"protected": 8})
    with pytest.raises(ValueError, match="positions=absolute is not allowed: .* 512 learned positions"):
        Controller(own, Settings(positions="absolute", **settings))
    Controller(own, Settings(**settings))
