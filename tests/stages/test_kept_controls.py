"""A control that was trained once is not trained again, and says the same in the table."""

import json

import pytest
import torch

from megactx.framework.app import run

# One validation, at the end: the best checkpoint, which the report is of, is the last.
MORE = ["stage.keep_controls=true", "stage.evaluate.copies=0", "preset.validate_every=4"]


@pytest.fixture
def kept(gist_run, tmp_path, monkeypatch):
    """Settings of a run but for its folder, and the folder of the cache."""
    monkeypatch.setenv("MEGACTX_CACHE", str(tmp_path / "cache"))
    settings = [setting for setting in gist_run if not setting.startswith("folder=")]
    return [*settings, *MORE], tmp_path / "cache" / "controls"


def rows(folder) -> dict:
    return json.loads((folder / "report.json").read_text())["groups"]["overall"]["rows"]


def weights(folder, net: str, name: str = "last.ckpt") -> dict:
    states = torch.load(folder / "checkpoints" / name, weights_only=True)["state_dict"]
    return {key: tensor for key, tensor in states.items() if key.startswith(f"nets.{net}.")}


def equal(one: dict, other: dict) -> bool:
    return bool(one) and one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_second_run_takes_the_control_of_the_first_and_its_own_net_is_what_it_would_be(kept, tmp_path, capsys):
    settings, cache = kept
    assert run([*settings, f"folder={tmp_path}/first"]) == 0
    assert len(list(cache.glob("*.safetensors"))) == 1 and "is not trained" not in capsys.readouterr().err
    # Another head: another compressor, the same control.
    for name, more in (("mlp", ["gistnet.head=mlp"]), ("again", [])):
        assert run([*settings, *more, f"folder={tmp_path}/{name}"]) == 0
        written = (tmp_path / name / "run.log").read_text() if (tmp_path / name / "run.log").exists() else ""
        assert "blockmean_linear is not trained" in written + capsys.readouterr().err
        assert equal(weights(tmp_path / name, "blockmean_linear"), weights(tmp_path / "first", "blockmean_linear"))
        assert rows(tmp_path / name)["blockmean_linear"] == pytest.approx(rows(tmp_path / "first")["blockmean_linear"])
    assert len(list(cache.glob("*.safetensors"))) == 1
    for key, tensor in weights(tmp_path / "again", "gistnet").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "first", "gistnet")[key], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "other", ["seed=7", "preset.steps=8", "base.lr=0.0004", "preset.spans=4", "loss.block.seam_weight=0.5"]
)
def test_another_recipe_trains_its_own(kept, tmp_path, other):
    settings, cache = kept
    assert run([*settings, f"folder={tmp_path}/first"]) == 0
    assert run([*settings, other, f"folder={tmp_path}/other"]) == 0
    assert len(list(cache.glob("*.safetensors"))) == 2
    assert not equal(weights(tmp_path / "first", "blockmean_linear"), weights(tmp_path / "other", "blockmean_linear"))


@pytest.mark.slow
def test_a_run_that_is_resumed_goes_on_with_what_it_began_with(kept, tmp_path, monkeypatch):
    settings, cache = kept
    whole = [*settings, f"folder={tmp_path}/whole"]
    assert run(whole) == 0
    (control,) = cache.glob("*.safetensors")
    aside = control.rename(tmp_path / "aside")
    # Begun while nothing was kept, gone on with when something is: it trains its control to the end.
    from megactx.stages.gist import GistStage

    usual, stop = GistStage.on_train_batch_end, []

    def stopping(self, *given, **more):
        usual(self, *given, **more)
        if stop and self.trainer.global_step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(GistStage, "on_train_batch_end", stopping)
    for name, there in (("without", False), ("with", True)):
        if there:
            aside.rename(control)
        cut = [*settings, f"folder={tmp_path}/{name}", "preset.validate_every=1"]  # a checkpoint before the stop
        stop.append(1)
        assert run(cut) != 0
        stop.clear()
        if not there:
            aside.rename(control)
        taken = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["taken"]
        assert taken == (["blockmean_linear"] if there else [])
        if there:
            aside = control.rename(tmp_path / "aside")
        assert run([*cut, "resume=auto"]) == 0
        assert equal(weights(tmp_path / name, "blockmean_linear"), weights(tmp_path / "whole", "blockmean_linear"))
        if not there:
            aside = control.rename(tmp_path / "aside")


@pytest.mark.slow
def test_a_damaged_file_is_trained_anew(kept, tmp_path):
    settings, cache = kept
    assert run([*settings, f"folder={tmp_path}/first"]) == 0
    (control,) = cache.glob("*.safetensors")
    whole = control.read_bytes()
    control.write_bytes(whole[:100])
    assert run([*settings, f"folder={tmp_path}/second"]) == 0
    assert control.read_bytes() == whole
    assert equal(weights(tmp_path / "first", "blockmean_linear"), weights(tmp_path / "second", "blockmean_linear"))


@pytest.mark.slow
def test_a_run_that_starts_from_another_keeps_no_controls(kept, tmp_path, capsys):
    settings, _ = kept
    assert run([*settings, f"folder={tmp_path}/first"]) == 0
    assert run([*settings, f"stage.init={tmp_path}/first", f"folder={tmp_path}/second"]) == 2
    assert "stage.keep_controls=true is not allowed with stage.init" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_goes_on_with_other_steps_is_refused_and_leaves_the_cache_as_it_was(kept, tmp_path, capsys):
    settings, cache = kept
    whole = [*settings, f"folder={tmp_path}/first"]
    assert run(whole) == 0
    before = {file.name: file.read_bytes() for file in cache.iterdir()}
    capsys.readouterr()
    assert run([*whole, "preset.steps=8", "resume=auto"]) == 2
    assert "stage.keep_controls=true: the run was begun with another length" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == before


def test_a_cache_that_cannot_be_used_is_told_before_the_training(kept, tmp_path, capsys):
    settings, cache = kept
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file")
    assert run([*settings, f"folder={tmp_path}/first"]) == 2
    said = capsys.readouterr().err
    assert "stage.keep_controls=true" in said and "cannot be made" in said
    assert not (tmp_path / "first" / "checkpoints" / "last.ckpt").exists()


def test_a_control_that_cannot_be_kept_does_not_cost_the_report(kept, tmp_path, monkeypatch, capsys):
    from megactx.framework.errors import RunFailed
    from megactx.stages import kept_controls

    def full(tensors, part):
        raise RunFailed("the disk is full")

    settings, cache = kept
    monkeypatch.setattr(kept_controls, "save_file", full)
    assert run([*settings, f"folder={tmp_path}/first"]) == 0
    assert (tmp_path / "first" / "report.json").exists() and not list(cache.iterdir())
