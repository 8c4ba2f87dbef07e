"""What a session learns of its blocks, and how it is curated while it goes on."""

import json
import os
import shutil
import signal
import sqlite3
import time
from dataclasses import replace

import pytest
import torch

from megactx.framework.errors import RunFailed
from megactx.memory import archive, storage
from megactx.memory.curation import Curated
from megactx.memory.curation_settings import CurationSettings
from megactx.memory.invariants import violations
from megactx.runtime import Session, focusing
from megactx.runtime import curation as keeping


def stored(folder):
    return Curated(folder / "tree")


def test_lensnets_mean_word_on_each_block_is_kept_with_the_session(controller, ids, tmp_path, monkeypatch):
    said: dict[int, list[float]] = {}
    told = focusing.note_worth

    def heard(context, legal, scores):
        for where, worth, width in (
            (legal.expand & (context.lod == 1), scores.v_down, 1),
            (legal.leads & (context.lod == 0), scores.v_keep, 4),
        ):
            for column in where[0].nonzero()[:, 0].tolist():
                said.setdefault(int(context.index[0, column]) // width, []).append(float(worth[0, column]))
        told(context, legal, scores)

    monkeypatch.setattr(focusing, "note_worth", heard)
    session = Session(controller())
    session.append(ids(400), score=True)
    session.save(tmp_path / "talk")
    session.close()
    worth = stored(tmp_path / "talk").worth
    assert len(said) > 20 and set((~worth.isnan()).nonzero()[:, 0].tolist()) == set(said)
    for block, values in said.items():
        assert float(worth[block]) == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-6)
    again = Session.load(tmp_path / "talk", controller())
    before = again.tree.levels[1].whole("scored").sum()
    again.append(ids(80, seed=1), score=True)
    assert again.tree.levels[1].whole("scored").sum() > before
    again.close()


def test_a_session_without_focus_keeps_no_signals_and_gets_them_once_it_has_focus(controller, ids, tmp_path):
    session = Session(controller("recency"))
    session.append(ids(400), score=True)
    session.save(tmp_path / "talk")
    session.close()
    assert not session.tree.signals and stored(tmp_path / "talk").file.sizes()["signals"] == 0
    assert stored(tmp_path / "talk").worth.isnan().all()
    again = Session.load(tmp_path / "talk", controller())  # the format of before
    again.append(ids(200, seed=1), score=True)
    again.save()
    again.close()
    blocks = stored(tmp_path / "talk")
    assert 0 < int((~blocks.worth.isnan()).sum()) < len(blocks.worth) and blocks.file.sizes()["signals"] > 0
    third = Session.load(tmp_path / "talk", controller())
    known = torch.where(third.tree.levels[1].whole("scored")[0] > 0, blocks.worth, torch.nan)
    assert torch.equal(known.isnan(), blocks.worth.isnan())
    third.close()


def test_a_part_of_somebody_else_learns_nothing(controller, ids, tmp_path):
    from megactx.memory import MegaContextTree
    from megactx.runtime import Wanted

    models = controller().models
    MegaContextTree.from_tokens(ids(1, 300), models.gistnet, models.base).save(tmp_path / "library")
    session = Session(controller(budget=240), parts=[Wanted("library", tmp_path / "library", 0.3)])
    session.append(ids(400), score=True)
    assert session.tree.signals and not session.parts[0].tree.signals


UNREAD = CurationSettings(policies={"unread": {"behind": 0}}, every=64, spans=1)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(archive, "RECENT", 64)
    for module in (archive, keeping):
        monkeypatch.setattr(module, "RUN", 32)


def told(session):
    """Tokens of the history, with those that were taken away as 0."""
    return session.tree.tokens[0]


def check_window(session):
    """Nothing stands there finer than its floor."""
    context = session.stream.context
    zero = torch.zeros_like(context.lod[0])
    assert (session.tree.floors(zero, context.lod[0], context.index[0]) <= context.lod[0]).all()
    assert not violations(context)


def test_a_plan_is_done_beside_a_session_that_goes_on_and_its_window_never_shows_what_is_gone(
    controller, ids, tmp_path, small
):
    session = Session(controller())
    session.append(ids(800), score=True)
    session.save(tmp_path / "talk")
    before = told(session).clone()
    session.curate(UNREAD)
    session.append(ids(100, seed=1), score=True)
    session.tidy()
    seen = set()
    for number, token in enumerate(ids(400, seed=2)):
        opened = session.tree.levels[1].whole("opened")[0] > 0
        session.stream.push(token[None])
        check_window(session)
        floors = session.tree.levels[1].whole("floor")[0]
        assert not (floors[: len(opened)] > 0)[opened].any() and not floors[0].any()
        seen.add(session.tree.compacted)
        if number == 200:
            session.tidy()
    keeper = session.stream.keeper
    assert keeper.note == "" and keeper.freed > 0 and len(seen) > 5  # bit by bit
    gone = session.tree.levels[1].whole("floor")[0] > 0
    assert int(gone.sum()) == session.tree.compacted > 50 and not gone[-16:].any()
    length, window = session.length, session.context.copy()
    session.save()
    session.close()
    again = Session.load(tmp_path / "talk", controller())
    assert again.length == length and again.tree.compacted == int(gone.sum())
    assert torch.equal(again.context.lod, window.lod) and torch.equal(again.context.index, window.index)
    assert not told(again).view(-1, 4)[: len(gone)][gone[: len(told(again)) // 4]].any() or len(told(again)) % 4
    assert again.restore() > 5 and again.tree.compacted == 0
    assert torch.equal(told(again)[: len(before)], before)
    again.close()


def test_curate_now_and_restore_leave_an_open_session_as_it_was(controller, ids, tmp_path, small):
    session = Session(controller("recency"))
    with pytest.raises(ValueError, match="needs a folder"):
        session.curate_now()
    session.append(ids(900))
    session.save(tmp_path / "talk")
    before = [level.whole(name) for level in session.tree.levels for name in level.columns]
    session.curate(UNREAD)
    assert session.curate_now() > 1000 and session.tree.compacted > 50
    with pytest.raises(ValueError, match="was taken away"):
        session.ids()
    assert Curated(tmp_path / "talk" / "tree").about["compacted"] == session.tree.compacted
    assert session.restore() > 1
    after = [level.whole(name) for level in session.tree.levels for name in level.columns]
    assert all(map(torch.equal, before, after))
    assert session.curate_now() > 0 and len(session.ids(0, 1)) == 1
    session.close()


def test_a_live_session_purges_what_it_archived_longer_ago_than_its_retention(
    controller, ids, tmp_path, small, monkeypatch
):
    session = Session(controller("recency"))
    session.append(ids(900))
    session.save(tmp_path / "talk")
    old = CurationSettings(policies={"unread": {"behind": 600}}, retention=10)
    session.curate(old)
    assert session.curate_now() > 0
    first = session.tree.compacted
    day = time.time() + 9 * 86_400
    monkeypatch.setattr(archive.time, "time", lambda: day)
    session.curate(replace(old, policies={"unread": {"behind": 300}}))
    assert session.curate_now() > 0 and (both := session.tree.compacted) > first  # nothing is ten days old yet
    assert {entry[1] for entry in stored(tmp_path / "talk").log()} == {"compact"}
    day += 2 * 86_400
    session.curate(replace(old, retention=None))
    session.curate_now()
    assert {entry[1] for entry in stored(tmp_path / "talk").log()} == {"compact"}
    session.curate(replace(old, every=1))
    session.append(ids(4, seed=1))
    session.tidy()  # as between two turns: there is nothing to archive, and what is old goes all the same
    session.stream.keeper.planning.exception()
    session.append(ids(4, seed=2), score=True)
    gone = [entry[2:4] for entry in stored(tmp_path / "talk").log() if entry[1] == "purge"]
    assert sum(stop - start for start, stop in gone) == first * 4
    assert session.restore() > 0 and session.tree.compacted == first and both > first  # the newer ones are back
    session.close()


def test_what_is_not_saved_may_be_forgotten_so_it_is_not_archived(controller, ids, tmp_path, small):
    session = Session(controller("recency"))
    session.append(ids(400))
    session.save(tmp_path / "talk")
    session.append(ids(800, seed=1))
    session.curate(UNREAD)
    session.stream.keeper.plan()
    session.stream.keeper.finish()
    session.stream.logits()
    session.close()  # not saved
    again = Session.load(tmp_path / "talk", controller("recency"))
    assert again.length == 401 and again.tree.compacted == int((again.tree.levels[1].whole("floor") > 0).sum()) > 10
    assert again.restore() and torch.equal(again.ids()[1:], ids(400))
    again.close()


@pytest.mark.slow
def test_a_plan_of_another_process_is_done_by_the_one_that_has_the_session(controller, ids, tmp_path, small):
    session = Session(controller())
    session.append(ids(800), score=True)
    session.save(tmp_path / "talk")
    place = tmp_path / "talk" / keeping.HANDED
    place.write_text(json.dumps(Curated(tmp_path / "talk" / "tree").plan({"unread": {"behind": 0}})))
    for token in ids(300, seed=2):
        session.stream.push(token[None])
        check_window(session)
    assert session.tree.compacted > 50 and not place.exists()
    place.write_text("no plan")
    session.append(ids(40), score=True)
    assert "it is no plan" in session.stream.keeper.note
    session.close()


def test_a_full_disk_leaves_the_open_session_and_its_tree_whole(controller, ids, tmp_path, small, monkeypatch):
    session = Session(controller("recency"))
    session.append(ids(900))
    session.save(tmp_path / "talk")
    before = [level.whole(name) for level in session.tree.levels for name in level.columns]
    session.curate(UNREAD)

    def full(*_, **__):
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(session.tree.home[0], "put", full)
        session.stream.keeper.plan()
        with pytest.raises((RunFailed, sqlite3.OperationalError)):
            session.stream.keeper.finish()
    after = [level.whole(name) for level in session.tree.levels for name in level.columns]
    assert all(map(torch.equal, before, after)) and session.tree.compacted == 0
    session.append(ids(100, seed=3))
    session.save()
    assert session.curate_now() > 0
    session.close()


def test_a_live_step_that_is_killed_is_done_or_not_done(controller, ids, tmp_path, small):
    session = Session(controller("recency"))
    session.append(ids(900))
    session.save(tmp_path / "talk")
    session.close()
    text, seen = ids(900), set()
    for step in (*range(0, 400, 50), *range(400, 3000, 400), 10**6):
        place = tmp_path / f"killed{step}"
        shutil.copytree(tmp_path / "talk", place)
        child = os.fork()
        if child == 0:
            try:
                own, left = Session.load(place, controller("recency")), [step]
                own.append(ids(60, seed=1))
                own.curate(CurationSettings(policies=UNREAD.policies, spans=100))

                def count(left=left):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

                own.stream.keeper.plan()
                own.stream.keeper.planning.result()
                own.tree.home[0].db.set_progress_handler(count, 1)
                own.stream.keeper.finish()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        again = Session.load(place, controller("recency"))
        gone = again.tree.levels[1].whole("floor")[0] > 0
        assert again.length == 901 and int(gone.sum()) == again.tree.compacted
        seen.add(again.tree.compacted > 0)
        assert (again.restore() > 0) == bool(gone.any()) and torch.equal(again.ids()[1:], text)
        assert not storage.damaged(place / "tree")
        again.close()
    assert seen == {False, True}
