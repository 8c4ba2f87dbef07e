"""Curation as a person uses it."""

import io
import json
import resource
import shutil

import pytest
import torch

from megactx.apps import chat, curation
from megactx.apps.command_line import curation_of
from megactx.memory import archive
from megactx.memory import curation as memory
from megactx.memory.curation import Curated
from megactx.runtime import Controller, Session, Settings, load_models

SMALL = dict(budget=96, allocator={"protected": 8})


@pytest.fixture(scope="module")
def saved(exported, ids, tmp_path_factory):
    """A saved session of 400 tokens with focus."""
    folder = tmp_path_factory.mktemp("saved") / "talk"
    with Session(Controller(load_models(str(exported)), Settings(**SMALL))) as session:
        session.append(ids(400), score=True)
        session.save(folder)
    return folder


@pytest.fixture
def talk(saved, tmp_path):
    """A copy of it."""
    return shutil.copytree(saved, tmp_path / "talk")


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


def planned(talk, tmp_path, *how):
    assert curation.main(["plan", str(talk), str(tmp_path / "plan.json"), *how]) == 0
    return json.loads((tmp_path / "plan.json").read_text())["actions"]


def test_a_config_chooses_policies_and_settings_and_what_is_named_has_the_last_word(talk, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "RECENT", 100)
    assert planned(talk, tmp_path) == []  # nothing is so old
    assert planned(talk, tmp_path, "--config", "off,policies={unread:{behind:0}}")  # as any setting
    assert planned(talk, tmp_path, "--config", "off") == []
    one = planned(talk, tmp_path, "--config", "default,policies.unread.behind=200")
    assert one and {action["floor"] for action in one} == {1} and max(action["stop"] for action in one) <= 200
    two = planned(talk, tmp_path, "--config", "unread,policies.unread.behind=100")
    assert {action["floor"] for action in two} == {2}
    assert {
        action["floor"]
        for action in planned(talk, tmp_path, "--config", "unread", "--floor", "1", "--policy", "unread:behind=0")
    } == {1}
    said = planned(talk, tmp_path, "--config", "budget,policies.budget.megabytes=0.0001")
    assert {action["reason"] for action in said} == {"budget"}
    little = planned(talk, tmp_path, "--config", "low_information")
    assert "entropy" in {action["reason"] for action in little}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("defualt", "curation=defualt: no such option. Did you mean"),
        ("default,flor=2", "curation.flor"),
        ("default,policies.forget={}", "curation.policies.forget"),
        ("default,floor=0", "floor=0 is not allowed"),
        ("default,every=often", "every=often"),
    ],
)
def test_a_config_that_is_wrong_is_one_message(talk, capsys, config, said):
    assert curation.main(["report", str(talk), "--config", config]) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told and told.count("\n") == 1


def test_every_option_of_the_group_is_a_setting_that_can_be_used():
    from megactx.framework.config.config_docs import groups

    names = [option.name for option in groups()["curation"]]
    assert {"default", "budget", "unread", "off"} <= {*names}
    for name in names:
        assert curation_of(name).named.keys() <= {*memory.names()}


def test_a_session_in_use_is_planned_and_takes_up_the_plan_itself(talk, exported, ids, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(archive, "RECENT", 100)
    plan = str(tmp_path / "plan.json")
    with Session.load(talk, Controller(load_models(str(exported)), Settings(**SMALL))) as session:
        assert curation.main(["plan", str(talk), plan, "--policy", "unread:behind=100"]) == 0
        assert curation.main(["report", str(talk)]) == 0 and curation.main(["log", str(talk)]) == 0
        assert curation.main(["restore", str(talk)]) == 2 and "is in use by process" in capsys.readouterr().err
        assert curation.main(["apply", str(talk), plan]) == 0 and "at its next refocuses" in capsys.readouterr().out
        session.append(ids(60, seed=1), score=True)
        assert session.tree.compacted > 5
        session.save()
    assert curation.main(["log", str(talk)]) == 0 and "compact" in capsys.readouterr().out
    assert curation.main(["restore", str(talk)]) == 0


def test_a_chat_is_curated_and_restored(talk, exported, monkeypatch, capsys):
    monkeypatch.setattr(archive, "RECENT", 100)
    how = "default,policies.unread.behind=100,every=1"
    said = f"/curate {how}\n/restore\n/curate off\nHello\n/quit\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(said.encode())))
    asked = ["--model", str(exported), "--session", str(talk), "--budget", "400", "--tokens", "8", "--curation", how]
    assert chat.main(asked) == 0
    told = capsys.readouterr().out
    assert "MB went into the archive" in told and "spans were restored" in told and "0.000 MB went" in told
    kept = Curated(talk / "tree")
    assert not (kept.floor > 0).any() and {entry[1] for entry in kept.log()} == {"compact", "restore"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["purge", "--days", "-5"], "days=-5 is not allowed: at least 0"),
        (["purge", "--days", "nan"], "days=nan is not allowed: at least 0"),
        (["report", "--policy", "unread:behind=often"], "policy=unread: behind=often is not allowed, it is int"),
        (["report", "--policy", "unread:behind=1.5"], "policy=unread: behind=1.5 is not allowed, it is int"),
        (["report", "--policy", "unread:after=5"], "policy=unread: after is not known, there are behind"),
        (["report", "--policy", "budget"], "policy=budget: megabytes has no value"),
    ],
)
def test_a_number_that_is_wrong_is_one_message_that_names_it_and_changes_nothing(
    talk, capsys, monkeypatch, arguments, said
):
    monkeypatch.setattr(archive, "RECENT", 100)
    kept = Curated(talk / "tree")
    kept.apply(kept.plan({"unread": {"behind": 100}}))
    before = kept.log()
    assert curation.main([arguments[0], str(talk), *arguments[1:]]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1 and Curated(talk / "tree").log() == before


@pytest.mark.parametrize(
    "actions", [[{}], [5], [{"floor": 10**9}], [{"floor": 0}], [{"start": "x"}], [{"reason": None}], [{"stop": 1.5}]]
)
def test_a_plan_that_somebody_has_spoiled_is_refused_and_a_session_in_use_goes_on(
    talk, exported, ids, tmp_path, capsys, actions
):
    whole = {"start": 4, "stop": 8, "floor": 1, "action": "compact", "reason": "a test"}
    actions = [whole | action if action else action for action in actions if action != 5] or actions
    (tmp_path / "plan.json").write_text(json.dumps({"format": 1, "actions": actions}))
    assert curation.main(["apply", str(talk), str(tmp_path / "plan.json")]) == 2
    told = capsys.readouterr().err
    assert "it is no plan" in told and told.count("\n") == 1
    with Session.load(talk, Controller(load_models(str(exported)), Settings(**SMALL))) as session:
        (talk / "curation.json").write_text((tmp_path / "plan.json").read_text())
        session.append(ids(8, seed=1), score=True)
        assert "it is no plan" in session.stream.keeper.note and session.tree.compacted == 0


def test_on_a_full_disk_a_tree_is_not_called_damaged_and_nothing_is_changed(talk, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, before[1]))
    try:
        assert curation.main(["restore", str(talk)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told = capsys.readouterr().err
    assert "the disk is full or fails: make room" in told and "damaged" not in told
    assert curation.main(["restore", str(talk)]) == 0
