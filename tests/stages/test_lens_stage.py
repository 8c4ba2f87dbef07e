"""The lens stage in miniature: what it trains, keeps, resumes and reports."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file

from megactx.focus import FocusAllocator
from megactx.framework.app import run
from megactx.framework.callbacks.checkpoints import AtomicCheckpointIO
from megactx.framework.config.search_path import compose
from megactx.framework.errors import RunFailed
from megactx.gist import GistNet
from megactx.lm import BaseLM
from megactx.parts.write import save_gistnet
from megactx.stages import lens_labels
from megactx.stages.lens import LensStage


@pytest.fixture(scope="module")
def settings(base_folder, texts, tmp_path_factory):
    base = BaseLM.from_pretrained(str(base_folder)).freeze()
    torch.manual_seed(3)
    net, folder = GistNet(32, base.embedding_rms(), block_size=8, num_heads=4), tmp_path_factory.mktemp("gistnet")
    save_gistnet(net, {"block_size": 8, "num_heads": 4}, base, folder / "net")
    return [
        *["experiment=lens", "preset=demo", "data=files", f"data.path={texts}", f"base.name={base_folder}"],
        *[f"stage.gistnet={folder / 'net'}", "data.weights={narrative: 0.5, code: 0.5, structured: 0}"],
        *["block_size=8", "horizon.tokens=8", "lensnet.num_heads=4", "preset.steps=4", "preset.warmup=1"],
        *["preset.validate_every=2", "datamodule.min_tokens=300", "datamodule.max_tokens=400", "datamodule.batch=2"],
        *["datamodule.validation_windows=3", "stage.budgets=[0.6, 0.7]", "stage.windows.per_round=4"],
        *["stage.windows.rounds=2", "stage.windows.edits=6", "stage.evaluate.documents=3", "stage.evaluate.oracle=1"],
        *["stage.evaluate.tokens=300", "stage.evaluate.budgets=[0.6, 0.7]", "stage.evaluate.planted=4"],
        *["trainer=cpu", "trainer.precision=32-true", "trainer.log_every_n_steps=1"],
    ]


def weights(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("lens") / "run"
    assert run([*settings, f"folder={folder}"]) == 0
    return folder


def test_every_parameter_of_lensnet_is_trained_and_kept_and_nothing_else_changes(whole, settings):
    stage = instantiate(compose([*settings, "folder=unused"]).stage, _convert_="all")
    held = {id(p) for group in stage.configure_optimizers()["optimizer"].param_groups for p in group["params"]}
    assert held == {id(p) for p in stage.lens.parameters()}
    assert not any(p.requires_grad for part in (stage.base, stage.gistnet) for p in part.parameters())
    saved = weights(whole)
    assert {name.removeprefix("lens.") for name in saved if name.startswith("lens.")} == set(stage.lens.state_dict())
    for name, value in stage.gistnet.state_dict().items():
        torch.testing.assert_close(saved[f"gistnet.{name}"], value, rtol=0, atol=0)
    assert saved["lens.updates"] == 4 and saved["lens.tau"] != 0.05
    assert saved["lens.last.weight"].abs().min() > 0, "it starts at zero: some of it was not trained"
    stage.train()
    assert stage.lens.training and not stage.gistnet.training and not stage.base.training


def test_a_step_on_a_card_whose_peak_is_known_has_an_mfu(settings, tmp_path, monkeypatch):
    from megactx.framework.callbacks.throughput import Throughput

    monkeypatch.setattr(Throughput, "setup", lambda self, trainer, pl_module, stage: setattr(self, "peak", 1e12))
    monkeypatch.setattr(LensStage, "finish", lambda *_: None)
    assert run([*settings, f"folder={tmp_path / 'a'}", "logger=csv"]) == 0
    with (tmp_path / "a" / "metrics.csv").open() as file:
        shares = [float(row["speed/mfu"]) for row in csv.DictReader(file) if row.get("speed/mfu")]
    assert shares and min(shares) > 0


def test_a_checkpoint_loads_by_its_path_alone(whole):
    loaded = LensStage.load_from_checkpoint(whole / "checkpoints" / "last.ckpt", weights_only=True)
    for name, value in weights(whole).items():
        if name.startswith("lens."):
            assert torch.equal(loaded.state_dict()[name], value)


def test_the_report_has_every_policy_at_every_budget_and_the_planted_facts(whole):
    numbers = json.loads((whole / "report.json").read_text())
    policies = {"recency", "random blocks", "most surprising blocks", "BM25 of the tail", "gists", "LensNet"}
    assert set(numbers["budgets"]) == {"0.6", "0.7"}
    for budget in numbers["budgets"].values():
        assert set(budget["rows"]) == policies | {"full context", "greedy oracle", "newest tokens alone"}
        assert budget["rows"]["full context"]["cost"]["point"] == 0
        assert budget["rows"]["greedy oracle"]["documents"] == 1
        assert {"swap_rate", "utilisation", "residency"} <= set(budget["telemetry"])
    assert numbers["planted"]["kinds"]["overall"]["cases"] == 4 and numbers["windows"] == 3
    assert (whole / "report.png").stat().st_size > 1000 and "LensNet" in (whole / "report.md").read_text()
    header = (whole / "metrics.csv").read_text().split("\n")[0].split(",")
    assert {"val/loss", "val/rank_correlation", "train/huber", "train/net_mass", "train/illegal"} <= set(header)


def test_under_mega_attention_the_same_edits_are_worth_something_else(whole, settings, tmp_path):
    mega = ["attention=mega", "attention.segment=32", "attention.mid=32", "attention.live=32"]
    assert run([*settings, *mega, f"folder={tmp_path / 'run'}"]) == 0
    other = 0
    for number in range(2):  # later ones are of LensNets that have learned
        plain, found = (
            load_file(folder / "windows" / "round_00" / f"{number:05d}.safetensors")
            for folder in (whole, tmp_path / "run")
        )
        assert all(
            torch.equal(plain[name], found[name]) for name in plain if name not in ("values", "column", "expand")
        )
        other += not torch.equal(plain["values"], found["values"])
    assert other
    assert json.loads((tmp_path / "run" / "windows" / "made.json").read_text())["attention"]["segment"] == 32
    assert "attention" not in json.loads((whole / "windows" / "made.json").read_text())


def test_a_step_looks_at_no_window_file_but_those_that_it_reads(tmp_path, monkeypatch):
    """4,096 looks a step would be 78 ms of it."""
    monkeypatch.setattr(lens_labels, "_claim", lambda *a: None)
    stage, count = SimpleNamespace(window_files={}), 8
    (tmp_path / "round_00").mkdir()
    for index in range(count):
        (tmp_path / "round_00" / f"{index:05d}.safetensors").touch()
    first = lens_labels.ensure(stage, None, tmp_path, 0, count)
    monkeypatch.setattr(Path, "stat", lambda *a, **k: pytest.fail("a step looked for a file"))
    monkeypatch.setattr(Path, "exists", lambda *a, **k: pytest.fail("a step looked for a file"))
    again = lens_labels.ensure(stage, None, tmp_path, 0, count)
    assert again == first == [tmp_path / "round_00" / f"{index:05d}.safetensors" for index in range(count)]


@pytest.mark.slow
def test_windows_of_a_run_that_failed_are_not_taken_for_those_of_other_settings(
    settings, texts, tmp_path, monkeypatch, capsys
):
    run_folder = tmp_path / "run"
    settings = [*settings, f"folder={run_folder}", "stage.windows.rounds=1"]

    def fail(*args):
        raise RunFailed("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(AtomicCheckpointIO, "save_checkpoint", fail)
        assert run(settings) == 3
    assert (run_folder / "error.txt").exists() and (run_folder / "windows" / "round_00" / "00003.safetensors").exists()
    assert len(validations(run_folder)) == 1
    assert run([*settings, "stage.budgets=[0.8, 0.9]"]) == 2
    assert "were measured otherwise: budgets: [0.6, 0.7] -> [0.8, 0.9]. Remove it" in capsys.readouterr().err
    assert run(settings) == 0  # the same settings take the windows that are there
    assert validations(run_folder) == ["1", "3"]  # of the run that failed there is no row


def validations(folder) -> list[str]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [row["step"] for row in csv.DictReader(file) if row["val/loss"]]


@pytest.mark.parametrize("moment", ["measuring", "training"])
@pytest.mark.slow
def test_a_run_that_is_interrupted_goes_on_to_the_same_weights(moment, whole, settings, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "training":
            step = LensStage.training_step
            patch.setattr(LensStage, "training_step", lambda s, b, i: stop() if s.global_step == 3 else step(s, b, i))
        else:
            make = lens_labels._make
            patch.setattr(lens_labels, "_make", lambda *a: stop() if a[-1].match("round_01/00002.*") else make(*a))
        assert run([*settings, f"folder={tmp_path / 'run'}"]) == 130
    there = {path: path.read_bytes() for path in (tmp_path / "run" / "windows").rglob("*.safetensors")}
    assert len(there) == (11 if moment == "training" else 9)  # 3 held out, 4 a round
    assert run([*settings, f"folder={tmp_path / 'run'}", "resume=auto"]) == 0
    mine, theirs = weights(tmp_path / "run"), weights(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert all(path.read_bytes() == content for path, content in there.items()), "a window was measured twice"
    assert (tmp_path / "run" / "report.json").read_text() == (whole / "report.json").read_text()


def test_a_checkpoint_of_earlier_days_loads_without_the_settings_that_are_gone(whole, tmp_path):
    checkpoint = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    hparams = checkpoint["hyper_parameters"]
    hparams |= {"objective": "value", "pair_weight": 0.0, "allocator": {"kind": "greedy", **hparams["allocator"]}}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    stage = LensStage.load_from_checkpoint(tmp_path / "old.ckpt", weights_only=True)
    assert FocusAllocator(**stage.hparams.allocator).temperature == 0 and "objective" not in stage.hparams
    assert all(torch.equal(v, checkpoint["state_dict"][f"lens.{k}"]) for k, v in stage.lens.state_dict().items())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.objective=preference", "stage.objective: no such setting"),
        ("stage.budgets=[0.6, 1.5]", "allowed is a list, each a number above 0, up to 1"),
        ("stage.budgets=[0.1]", "0.1 of"),
        ("stage.windows.edits=1", "stage.windows.edits=1: allowed is a whole number from 2"),
        ("stage.gistnet=nowhere", "there is no such folder or checkpoint"),
        ("stage.gistnet=asset:tiny-gistnet", "was trained with another base LM"),
        ("datamodule.max_tokens=600", "are not allowed: at most 504"),
        ("datamodule.planted=2", "datamodule.planted=2"),
        ("stage.evaluate.tokens=450", "none of held-out documents has so many tokens"),
        ("allocator.threshold=1", "allocator.threshold=1: allowed is a number from 0, below 1"),
    ],
)
def test_a_users_mistake_is_one_clear_message(override, message, settings, tmp_path, capsys):
    assert run([*settings, override, "stage.windows.per_round=2", f"folder={tmp_path / 'run'}"]) == 2
    assert message in capsys.readouterr().err
