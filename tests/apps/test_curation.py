"""Curation as a person uses it."""

import pytest
import torch

from megactx.apps import curation
from megactx.memory.curation import Curated
from megactx.runtime import Controller, Session, Settings, load_models

SMALL = dict(budget=96, allocator={"protected": 8})


@pytest.fixture
def talk(exported, ids, tmp_path):
    """A saved session of 400 tokens with focus."""
    with Session(Controller(load_models(str(exported)), Settings(**SMALL))) as session:
        session.append(ids(400), score=True)
        session.save(tmp_path / "talk")
    return tmp_path / "talk"


def test_measure_goes_on_and_report_says_what_is_known(talk, exported, capsys):
    ask = ["measure", str(talk), "--model", str(exported), "--blocks"]
    assert curation.main([*ask, "10"]) == 0 and "10 blocks were measured" in capsys.readouterr().out
    assert curation.main([*ask, "15"]) == 0 and "5 blocks were measured" in capsys.readouterr().out
    assert curation.main(["report", str(talk)]) == 0
    told = capsys.readouterr().out
    assert "measured dNLL of collapsing: 15 blocks" in told and "LensNet's word on their tokens: " in told
    assert int((~Curated(talk / "tree").dnll.isnan()).sum()) == 15
    assert "access" not in told and "reads as gists" in told


def test_what_cannot_be_measured_is_one_message(talk, exported, capsys):
    assert curation.main(["measure", str(talk), "--model", str(exported), "--blocks", "0"]) == 2
    assert "--blocks=0 is not allowed: at least 1" in capsys.readouterr().err
    assert curation.main(["measure", str(talk)]) == 2
    assert "another GistNet made it" in capsys.readouterr().err
    assert torch.equal(Curated(talk / "tree").dnll.isnan(), torch.ones(100, dtype=torch.bool))
