"""Gist stages with Gaussian RoPE and with gists of gists: what is trained, saved and reported."""

import json

import pytest
import torch
from hydra.utils import instantiate
from torch.utils.data import default_convert

from megactx.framework.app import run
from megactx.framework.config.search_path import compose
from megactx.stages.gist import GistStage


def config(overrides: list[str]):
    return compose([o for o in overrides if not o.startswith("folder=")])


def stage_of(overrides: list[str]) -> GistStage:
    return instantiate(config(overrides).stage, _convert_="all")


def batch_of(overrides: list[str], stage: GistStage) -> dict:
    module = instantiate(config(overrides).datamodule, _convert_="all")
    stage.prepare(module)
    module.setup()
    return default_convert(module.training[0])


@pytest.fixture
def lod2(gist_run):
    """experiment=gist_lod2 in miniature: K = 8, so a span of level 2 has 64 tokens."""
    sizes = ["block_size=8", "data.min_tokens=200", "data.max_tokens=256", "stage.evaluate.level2=12"]
    return [o.replace("experiment=demo", "experiment=gist_lod2") for o in gist_run] + ["preset=demo", *sizes]


def held(stage) -> set[int]:
    return {id(p) for group in stage.configure_optimizers()["optimizer"].param_groups for p in group["params"]}


@pytest.mark.parametrize("muon_lr", ["null", "0.01"])
def test_the_learned_factors_are_trained_and_in_the_optimizer(gist_run, muon_lr):
    stage = stage_of([*gist_run, "gaussian_rope=learned", f"stage.muon_lr={muon_lr}"])
    factors = [net.spread.log_scale for net in stage.nets.values()]
    assert len(factors) == 2 and {id(p) for p in factors} <= held(stage) == {id(p) for p in stage.nets.parameters()}
    loss = stage.losses[0].per_net(stage.context(batch_of(gist_run, stage)))[0]
    loss[0].backward()
    assert factors[0].grad[0] != 0 and (factors[0].grad[1:] == 0).all()
    assert (factors[1].grad == 0).all(), "the GistNet's loss reached a control's factor"


def test_plain_is_the_default_and_adds_nothing_and_damped_changes_the_loss_only(gist_run):
    losses = {}
    for mode in ("default", "plain", "damped", "learned"):
        torch.manual_seed(0)
        stage = stage_of([*gist_run, *([f"gaussian_rope={mode}"] if mode != "default" else [])])
        batch = batch_of(gist_run, stage)
        losses[mode] = stage.losses[0].per_net(stage.context(batch))[0].detach()
        assert any("spread" in name for name in stage.state_dict()) == (mode == "learned")
    assert torch.equal(losses["default"], losses["plain"]) and torch.equal(losses["damped"], losses["learned"])
    assert not torch.allclose(losses["plain"], losses["damped"], rtol=1e-5)


@pytest.mark.slow
def test_a_run_trains_both_levels_and_reports_gists_of_gists_beside_their_opponents(lod2, tmp_path, capsys):
    assert run([*lod2, "gaussian_rope=learned", "gistnet.levels=2", "stage.lr=0.01"]) == 0
    shown, folder = capsys.readouterr().out, tmp_path / "run"
    assert "one gist of K gists in place of K^2 tokens" in shown and "its 8 gists" in shown
    numbers = json.loads((folder / "report.json").read_text())
    rows = numbers["level2"]["rows"]
    opponents = {"its 8 gists", "mean of its gists", "dropped", "blockmean_linear", "gistnet"}
    assert opponents <= set(rows) and numbers["level2"]["blocks"] == 12
    assert "level2/dnll" in [target["target"] for target in numbers["targets"]]
    logged = (folder / "metrics.csv").read_text().split("\n")[0].split(",")
    assert {"train/level2/loss", "train/level2/blockmean_linear/dnll", "val/level2/dnll", "val/dnll"} <= set(logged)
    assert (folder / "scores_level2.safetensors").exists()

    path = folder / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert saved["nets.gistnet.spread.log_scale"].abs()[:2].min() > 0, "a factor was not trained"
    assert any(name.startswith("nets.gistnet.above.0.") for name in saved)
    loaded = GistStage.load_from_checkpoint(path, weights_only=True)
    for name, p in loaded.nets.state_dict().items():
        torch.testing.assert_close(p, saved[f"nets.{name}"])


def test_the_weight_of_level_two_scales_its_loss_and_shared_weights_get_both_gradients(lod2):
    gradients = []
    for weight in (0.5, 1.0, 2.0):
        torch.manual_seed(0)
        stage = stage_of([*lod2, f"loss.level2.weight={weight}", "stage.controls={}"])
        batch = batch_of(lod2, stage)
        stage.log = lambda *_, **__: None
        stage.training_step(batch, 0).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in stage.gistnet.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[2] - gradients[1], 2 * (gradients[1] - gradients[0]), rtol=1e-3, atol=1e-5)
    assert (gradients[1] - gradients[0]).norm() > 1e-3 * gradients[0].norm()


@pytest.mark.parametrize(
    "overrides", [["loss.level2.weight=0"], ["datamodule.level2_spans=0"], ["data.min_tokens=100"]]
)
def test_a_recipe_for_gists_of_gists_that_cannot_work_is_refused(lod2, overrides, capsys):
    assert run([*lod2, *overrides]) == 2
    said = capsys.readouterr().err
    assert "level2_spans" in said and "Traceback" not in said


POOL = "+stage.controls.pool={name: gisting, block_size: 8}"


def test_a_loss_of_gists_of_gists_is_refused_before_training_where_a_control_makes_none(lod2, capsys):
    assert run([*lod2, POOL]) == 2
    assert "loss.level2.weight=1.0 is not allowed with pool, which makes no gists of gists" in capsys.readouterr().err


@pytest.mark.slow
def test_the_table_of_gists_of_gists_leaves_out_a_control_that_makes_none(gist_run, tmp_path):
    sizes = ["block_size=8", "stage.evaluate.level2=4", "stage.evaluate.copies=0", "preset.steps=2"]
    assert run([*gist_run, *sizes, POOL]) == 0
    numbers = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "gistnet" in numbers["level2"]["rows"] and "pool" not in numbers["level2"]["rows"]
    assert any(note.startswith("pool: no gists of gists") for note in numbers["notes"])


def test_weights_for_gists_of_gists_that_nothing_trains_are_refused(gist_run, capsys):
    assert run([*gist_run, "gistnet.levels=2"]) == 2
    assert "gistnet.levels=2" in capsys.readouterr().err
