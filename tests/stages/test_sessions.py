"""``callbacks=sessions``: logged in a real run under the names of the page, and without any effect on the run."""

import csv
import re
from pathlib import Path

import pytest
import torch

from megactx.framework.app import run
from megactx.runtime.metrics import METRICS

PAGE = (Path(__file__).parents[2] / "docs" / "telemetry.md").read_text(encoding="utf-8")
SMALL = ["callbacks=sessions", "callbacks.sessions.history=600", "callbacks.sessions.scored=32"]
SMALL += ["callbacks.sessions.budget=300"]


@pytest.fixture(scope="module")
def settings(joint_settings):
    return [
        "experiment=end_to_end",
        *[setting for setting in joint_settings if not setting.startswith("stage.lora")],
        *["preset.steps=2", "preset.validate_every=1", "stage.windows.sources=1", "stage.windows.variants=2"],
        *["stage.windows.per_pass=4", "datamodule.documents=1"],
        "allocator.threshold=0.0",
    ]


def logged(folder) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [row for row in rows if "session/nll" in row]


@pytest.mark.slow
def test_a_run_logs_a_session_at_each_validation_and_ends_as_without(settings, tmp_path):
    weights = []
    for name, more in (("watched", SMALL), ("alone", [])):
        assert run([*settings, *more, f"folder={tmp_path / name}"]) == 0
        weights.append(torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    rows = logged(tmp_path / "watched")
    assert len(rows) == 2 and not logged(tmp_path / "alone")
    found = {name.removeprefix("session/"): value for name, value in rows[-1].items() if name.startswith("session/")}
    assert found["compression"] > 1 and 0 < found["window.utilisation"] <= 1 and 0 <= found["kv.reuse"] <= 1
    assert sum(value for name, value in found.items() if name.startswith("lens.scores.")) == pytest.approx(1)
    assert found["tree.depth"] == 3 and 0 < found["nll"] < 20
    assert found["swap_rate"] >= 0 and found["edits.expand"] >= 0
    known = sorted((name.removeprefix("megactx.") for name in METRICS), key=len, reverse=True)
    for name in found:
        assert name in ("nll", "kv.reuse") or any(name == k or name.startswith(f"{k}.") for k in known), name
    section = PAGE.partition("| asked for |")[2]
    rows = [row for row in section.splitlines() if row.startswith("| ")]
    named = [
        name for row in rows for name in re.findall(r"`([a-z_.]+\.?[a-z0-9_]*)`", row.split("|")[2]) if name[0] != "."
    ]
    documented = {re.sub(r"\.\d+$", "", name) for name in named} - {
        "score_histogram",
        "residency",
    }  # none without edits
    assert documented - {"edits.room", "lens.price", "rope.scale", "prediction.rank.readout"} <= {
        re.sub(r"\.\d+$", "", name) for name in found
    }


def test_a_stage_or_a_text_that_is_no_good_for_a_session_is_told(settings, tmp_path, capsys):
    few = ["callbacks.sessions.history=100", f"folder={tmp_path / 'few'}"]
    assert run([*settings, *SMALL, *few]) == 2
    assert "callbacks.sessions.budget=300" in capsys.readouterr().err
    tight = ["callbacks.sessions.budget=50", f"folder={tmp_path / 'tight'}"]
    assert run([*settings, *SMALL, *tight]) == 2
    assert "callbacks.sessions: budget=50 is not allowed: at least" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stage_without_a_lensnet_is_watched_by_recency_with_its_rope_scales(gist_run, tmp_path):
    more = ["block_size=8", "gaussian_rope=learned", "preset.steps=2", "preset.validate_every=2"]
    assert run([*gist_run, *SMALL, *more]) == 0
    (row,) = logged(tmp_path / "run")
    assert row["session/rope.scale.1"] == pytest.approx(1, abs=0.05)  # two steps from where it started
    assert row["session/compression"] > 1 and not [name for name in row if name.startswith("session/lens")]


@pytest.mark.slow
def test_a_stage_with_a_readout_logs_where_the_blocks_that_came_stand(joint_settings, tmp_path):
    left = ("stage.lens", "lensnet", "datamodule", "stage.budgets", "stage.evaluate", "horizon", "stage.lora")
    shared = [setting for setting in joint_settings if not setting.startswith(left)]
    own = ["preset.steps=2", "preset.batch=2", "preset.validate_every=1", "preset.validation_documents=4"]
    own += ["data.min_tokens=300", "data.max_tokens=320", "stage.evaluate.documents=2", "preset.warmup=1"]
    assert run(["experiment=mega_prediction", *shared, *own, *SMALL, f"folder={tmp_path / 'run'}"]) == 0
    for row in logged(tmp_path / "run"):
        for by in ("readout", "map"):
            assert 1 / 256 <= row[f"session/prediction.rank.{by}"] <= 1
