"""Three stages from one command, each from the best of the one before, and exactly so after a stop."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from megactx.framework.app import run
from megactx.framework.run.curriculum import run_in_turn, stage_config
from megactx.framework.run.runfolder import held
from megactx.stages.gist import GistStage

STAGES = ["gist_stage1", "gist_stage2", "gist_stage3"]


@pytest.fixture
def curriculum(gist_run):
    """Overrides of a short curriculum on texts of two domains; a test adds ``folder=...``."""
    kept = [o for o in gist_run if not o.startswith(("experiment=", "folder=", "preset."))]
    short = "steps=4 warmup=1 accumulate=2 batch=2 spans=3 validate_every=2 validation_documents=2"
    short += " min_tokens=200 max_tokens=256"
    preset = [f"preset.{setting}" for setting in short.split()]
    return ["experiment=curriculum", *kept, *preset, "stage.evaluate.blocks=8", "logger=csv"]


def last(folder) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.slow
def test_a_curriculum_trains_its_stages_in_turn_and_ends_with_all_targets_in_one_table(curriculum, tmp_path, capsys):
    assert run([*curriculum, f"folder={tmp_path / 'a'}"]) == 0
    shown = capsys.readouterr().out
    assert "Stage 3 of 3: gist_stage3" in shown and "not informative" in shown
    table = (tmp_path / "a" / "curriculum.md").read_text()
    assert all(name in table for name in STAGES) and "| dropped |" in table
    assert (tmp_path / "a" / "curriculum.png").stat().st_size > 10_000 and (tmp_path / "a" / "done").exists()
    horizons = [json.loads((tmp_path / "a" / name / "report.json").read_text())["horizon"] for name in STAGES]
    assert horizons == [32, 64, 128]
    for before, name in zip(STAGES, STAGES[1:], strict=False):
        assert f"Starting from {tmp_path / 'a' / before / 'checkpoints' / 'best.ckpt'}" in shown
        assert last(tmp_path / "a" / name)["hyper_parameters"]["losses"]["contrastive"]["weight"] > 0


@pytest.mark.slow
def test_a_curriculum_that_stopped_in_a_stage_goes_on_to_the_same_weights(curriculum, tmp_path, monkeypatch, capsys):
    curriculum = [*curriculum, "gistnet.dropout=0.2"]
    assert run([*curriculum, f"folder={tmp_path / 'whole' / 'run'}"]) == 0
    step, count = GistStage.training_step, []

    def stops(self, batch, index):
        count.append(index)
        if len(count) == 4 * 2 + 6:  # in the third step of the second stage, after a checkpoint at the second
            raise RuntimeError("the power is gone")
        return step(self, batch, index)

    monkeypatch.setattr(GistStage, "training_step", stops)
    assert run([*curriculum, f"folder={tmp_path / 'stopped' / 'run'}"]) == 3
    monkeypatch.setattr(GistStage, "training_step", step)
    assert (tmp_path / "stopped" / "run" / "gist_stage1" / "done").exists()
    assert not (tmp_path / "stopped" / "run" / "gist_stage2" / "done").exists()
    capsys.readouterr()
    assert run([*curriculum, f"folder={tmp_path / 'stopped' / 'run'}", "resume=auto"]) == 0
    shown = capsys.readouterr().out
    assert "Going on from" in shown and "step 2" in shown and "Stage 1 of 3" not in shown
    for name in STAGES:
        one, other = (last(tmp_path / side / "run" / name)["state_dict"] for side in ("whole", "stopped"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


@pytest.mark.slow
def test_a_curriculum_whose_texts_were_changed_behind_a_stage_that_is_done_is_not_gone_on_with(
    curriculum, texts, tmp_path, monkeypatch, capsys
):
    shutil.copytree(texts, tmp_path / "texts")
    command = [o for o in curriculum if not o.startswith("data.path=")]
    command += [f"data.path={tmp_path / 'texts'}", f"folder={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:  # killed between two stages
        patch.setattr("megactx.framework.run.curriculum.close_folder", lambda folder: stop(folder))
        assert run(command) == 3
    one = sorted((tmp_path / "texts").glob("*.py"))[0]
    one.write_text(one.read_text().replace("e", "a"))
    capsys.readouterr()
    assert run([*command, "resume=auto"]) == 2
    assert "gist_stage1 was done with other content: the texts of data.source" in capsys.readouterr().err


def stop(folder):
    (folder / "done").touch()
    raise RuntimeError("the power is gone")


def test_a_stage_is_not_started_alone_while_its_curriculum_trains_it(curriculum, tmp_path, monkeypatch, capsys):
    def training(cfg, config, folder, device, checkpoint):
        with held(folder):  # as a run in it would
            raise AssertionError("two processes train in one folder")

    monkeypatch.setattr("megactx.framework.run.curriculum.build_and_run", training)
    monkeypatch.setattr("megactx.framework.run.curriculum.check_data", lambda stage, whole: None)
    assert run([*curriculum, f"folder={tmp_path / 'a'}"]) == 2
    assert f"folder={tmp_path / 'a' / 'gist_stage1'}: another process" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stage_alone_starts_from_any_checkpoint_of_the_same_gistnet(curriculum, tmp_path, capsys):
    alone = [o for o in curriculum if not o.startswith("experiment=")]
    assert run(["experiment=gist_stage1", *alone, f"folder={tmp_path / 'one'}"]) == 0
    given = f"stage.init={tmp_path / 'one'}"
    assert run(["experiment=gist_stage2", *alone, given, f"folder={tmp_path / 'two'}", "debug=fdr"]) == 0
    assert "gistnet, blockmean_linear" in capsys.readouterr().out
    wider = [o for o in alone if not o.startswith("block_size=")] + ["block_size=16", f"folder={tmp_path / 'wider'}"]
    assert run(["experiment=gist_stage2", *wider, given, "debug=fdr"]) == 0, "no weight knows its block size"
    assert "gistnet, blockmean_linear" in capsys.readouterr().out
    other = ["experiment=gist_stage2", *alone, given, f"folder={tmp_path / 'three'}", "depth=d1"]
    assert run(other) == 2
    said = capsys.readouterr().err
    assert "another architecture" in said and "gistnet.layers: 2 -> 1" in said
    assert run(["experiment=gist_stage2", *alone, "stage.init=/no/such", f"folder={tmp_path / 'four'}"]) == 2
    assert "stage.init=/no/such" in capsys.readouterr().err


@pytest.mark.slow
def test_a_curriculum_with_other_settings_is_not_gone_on_with(curriculum, tmp_path, capsys):
    assert run([*curriculum, f"folder={tmp_path / 'a'}"]) == 0
    (tmp_path / "a" / "done").unlink()
    assert run([*curriculum, f"folder={tmp_path / 'a'}", "resume=auto", "seed=1"]) == 2
    assert "seed: 0 -> 1" in capsys.readouterr().err
    assert run([*curriculum, f"folder={tmp_path / 'b'}", "resume=somewhere"]) == 2
    assert "resume=auto" in capsys.readouterr().err
    assert run([*curriculum, f"folder={tmp_path / 'a'}"]) == 2  # a fresh one does not write over it
    assert "it holds a run" in capsys.readouterr().err


def test_a_mistake_in_a_later_stage_is_told_before_the_first_one_runs(curriculum, tmp_path, capsys):
    wrong = [*curriculum, "curriculum=[gist_stage1,gist_stage9]", f"folder={tmp_path / 'a'}"]
    assert run(wrong) == 2
    assert "gist_stage9" in capsys.readouterr().err
    assert not (tmp_path / "a" / "gist_stage1").exists()


def test_a_run_of_two_stages_is_refused_before_it_trains_where_the_second_has_no_document_of_a_domain(
    curriculum, tmp_path, capsys, texts
):
    (tmp_path / "texts").mkdir()
    for path in texts.glob("*.md"):
        shutil.copy(path, tmp_path / "texts")
    own = [o for o in curriculum if not o.startswith("data.weights")]
    own += ["curriculum=[gist_stage1,gist_stage2]", f"data.path={tmp_path / 'texts'}", f"folder={tmp_path / 'a'}"]
    assert run(own) == 2
    assert "curriculum, stage gist_stage2: data.weights.code=0.6: there is no doc" in capsys.readouterr().err
    assert not (tmp_path / "a" / "gist_stage1").exists()


def test_the_data_of_all_stages_is_checked_before_the_first_one_trains(gist_settings, tmp_path):
    overrides = [o for o in gist_settings if not o.startswith("experiment=")]
    names = ("gist_stage1", "gist_stage2")
    stages = {name: stage_config(name, overrides, tmp_path) for name in names}
    stages["gist_stage2"][0].datamodule.weights = {"structured": 1.0}
    device = SimpleNamespace(accelerator="cpu", precision="32-true", why="", count=1)
    with pytest.raises(ValueError, match="curriculum, stage gist_stage2: data.weights.structured=1.0: there is no doc"):
        run_in_turn(stages, overrides, tmp_path, device, [], None)
    assert not list(tmp_path.rglob("*.ckpt")) and not (tmp_path / "gist_stage1").exists()
