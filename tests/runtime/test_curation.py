"""What a session learns of its blocks, and how it is curated while it goes on."""

import pytest
import torch

from megactx.memory.curation import Curated
from megactx.runtime import Session, focusing


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
