"""Panels of Weights & Biases: one per metric, a section per subsystem, for whatever runs log."""

import csv
import json
import re
from collections import Counter

import pytest

from megactx.apps import panels
from megactx.framework.app import run
from megactx.runtime import Session
from megactx.runtime.metrics import METRICS, SUBSYSTEMS, subsystem
from megactx.stages.sessions import summary

ALL = [panel for section in panels.sections().values() for panel in section]


def shown(name):
    return [panel.title for panel in ALL if re.fullmatch(panel.pattern, name)]


def test_every_metric_has_a_subsystem_and_a_panel_there():
    assert {subsystem(name) for name in METRICS} == {*SUBSYSTEMS}
    for name, metric in METRICS.items():
        titles = [panel.title for panel in panels.sections()[subsystem(name)]]
        assert (metric.meaning in titles) == (name not in panels.COUNTED), name
    assert {"training", "gists", "LensNet", "allocator", "tree", "time"} <= {*panels.sections()}
    assert not [title for title, count in Counter(panel.title for panel in ALL).items() if count > 1]


def test_what_a_session_says_is_in_one_panel_each(foretelling):
    events = []
    session = Session(foretelling(), [events.append])
    session.append("def read(path):\n    return path.read_text()\n" * 10)
    for _ in session.generate(40):
        pass
    found, scores = summary(events)
    assert sum(scores) and len(found) > 20 and {"prediction.rank.readout", "prediction.rank.map"} <= {*found}
    for name in (*(f"session/{name}" for name in found), "session/nll", "session/rope.scale.1"):
        assert len(shown(name)) == 1, (name, shown(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    "experiment",
    [
        "demo",
        "sft",
        "mega_prediction",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("lens", "end_to_end")),
    ],
)
def test_what_a_run_logs_is_in_one_panel_each(experiment, tmp_path, capsys):
    settings = ["preset=smoke", "trainer=cpu", "trainer.max_steps=2", "preset.steps=2", "preset.validate_every=1"]
    settings.append("preset.warmup=1")
    assert run([f"experiment={experiment}", *settings, f"folder={tmp_path / 'a'}"]) == 0, capsys.readouterr().err
    with (tmp_path / "a" / "metrics.csv").open(newline="") as file:
        names = {*next(csv.reader(file))} - {"epoch", "step"}
    assert len(names) > 5
    for name in names:
        assert len(shown(name)) == 1, (name, shown(name))


def test_the_view_is_what_would_be_saved_and_a_project_has_an_owner(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb_workspaces")
    file = tmp_path / "view.json"
    assert panels.main(["me/runs", "--json", str(file)]) == 0
    view = json.loads(file.read_text())
    bank = view["spec"]["section"]["panelBankConfig"]["sections"]
    assert [part["name"].lower() for part in bank] == ["reports", *(name.lower() for name in panels.sections())]
    assert "report/report" in json.dumps(bank[0]) and "report/curriculum" in json.dumps(bank[0])
    plots = [plot["config"] for part in bank[1:] for plot in part["panels"]]
    assert [plot["chartTitle"] for plot in plots] == [panel.title for panel in ALL]
    assert all(plot["useMetricRegex"] and plot["xAxis"] == "trainer/global_step" for plot in plots)
    assert panels.main(["runs"]) == 2 and "ENTITY/PROJECT" in capsys.readouterr().err
    save = "wandb_workspaces.workspaces.Workspace.save"
    monkeypatch.setattr(save, lambda self: (_ for _ in ()).throw(RuntimeError("no route")))
    assert panels.main(["me/runs"]) == 2
    said = capsys.readouterr().err
    assert "it was not saved (no route)" in said and "--json FILE" in said
