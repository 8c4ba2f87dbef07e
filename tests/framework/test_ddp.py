"""Several processes train on what one does with more accumulation, and only the first one writes."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megactx.data.resumable import Resumable
from megactx.framework.app import run
from megactx.framework.config.search_path import compose
from megactx.framework.config.validate import validate
from megactx.framework.run import distributed

REPOSITORY = Path(__file__).parents[2]
SGD = Path(__file__).with_name("plain_sgd.py")
TWO = ["trainer.accelerator=cpu", "trainer.devices=2"]


def shares(rank: int, count: int) -> Resumable:
    module = Resumable()
    ready = SimpleNamespace(total=SimpleNamespace(ready=0))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=ready))
    module.trainer = SimpleNamespace(global_rank=rank, world_size=count, fit_loop=loop)
    return module


def first(module: Resumable, count: int) -> list[int]:
    served = iter(module.indices())
    module.trainer.fit_loop.epoch_loop.batch_progress.total.ready += count
    return [next(served) for _ in range(count)]


def test_processes_share_the_batches_and_a_resumed_run_goes_on_behind_all_of_them():
    one, two = shares(0, 2), shares(1, 2)
    assert first(one, 3) == [0, 2, 4] and first(two, 3) == [1, 3, 5]
    assert one.state_dict() == two.state_dict()
    for count in (1, 2, 3):  # also on another number of devices
        served = []
        for rank in range(count):
            later = shares(rank, count)
            later.trainer.fit_loop.epoch_loop.batch_progress.total.ready = 3
            later.load_state_dict(one.state_dict())
            served += first(later, 2)
            assert later.state_dict()["served"] == 6 + 2 * count
        assert sorted(served) == list(range(6, 6 + 2 * count))


@pytest.mark.parametrize("items", [2, 3, 8])
def test_every_validation_item_is_in_one_share_only(items):
    both = [list(shares(rank, 2).share(items, "x")) for rank in (0, 1)]
    assert sorted(both[0] + both[1]) == list(range(items)) and all(both)


def test_fewer_validation_items_than_processes_are_refused_by_the_settings_name():
    with pytest.raises(ValueError, match="preset.validation_documents=1: 1 are too few for 2 processes"):
        shares(0, 2).share(1, "preset.validation_documents=1")


def test_another_process_takes_folder_and_checkpoint_from_the_first(tmp_path, monkeypatch):
    monkeypatch.delenv("MEGACTX_RUN", raising=False)
    with distributed.own_environment():
        for decided in ((None, tmp_path), (tmp_path / "a.ckpt", tmp_path / "b")):
            monkeypatch.setenv("LOCAL_RANK", "0")
            assert distributed.agreed(lambda decided=decided: decided) == decided
            monkeypatch.setenv("LOCAL_RANK", "1")
            assert distributed.agreed(lambda: pytest.fail("only the first one decides")) == decided
    assert "MEGACTX_RUN" not in os.environ


def test_a_sweep_over_jobs_of_several_devices_is_refused_with_the_reason(gist_settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ",".join(setting.partition("=")[0] for setting in [*gist_settings, *TWO, "trainer"])
    named = f"hydra.job.config.override_dirname.exclude_keys=[{names}]"
    settings = [setting for setting in gist_settings if setting != "trainer=cpu"]
    assert run(["-m", *settings, "trainer=ddp", *TWO, named, "seed=0,1"]) == 2
    said = capsys.readouterr()
    assert "trainer.devices=2: not with -m" in said.err and "run the whole sweep again" in said.err
    assert said.out.count("failed") == 2


@pytest.mark.parametrize("choice", ["ddp", "fsdp"])
def test_the_trainers_of_several_devices_compose_and_are_valid(choice):
    cfg = compose([f"trainer={choice}", "experiment=demo"])
    validate(cfg, compose([f"trainer={choice}"]))
    assert cfg.trainer.devices == "auto" and "strategy" in cfg.trainer


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_fsdp_without_cuda_ends_with_one_line_and_code_2(gist_run, capsys):
    settings = [setting for setting in gist_run if not setting.startswith("trainer")]
    assert run([*settings, "trainer=fsdp"]) == 2
    assert "trainer=fsdp: it needs CUDA" in capsys.readouterr().err


# What follows starts processes.


def python(*arguments) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(folder: Path, name: str) -> list[dict]:
    """The rows of the log that have a metric, as numbers, without what a clock said."""
    with (folder / "metrics.csv").open(newline="") as file:
        found = [
            {k: float(v) for k, v in row.items() if v and not k.startswith("speed/")} for row in csv.DictReader(file)
        ]
    return [row for row in found if name in row]


@pytest.fixture(scope="module")
def settings(gist_settings):
    kept = [setting for setting in gist_settings if setting != "trainer=cpu"]
    preset = [f"preset.{setting}" for setting in ("batch=1", "steps=3", "validate_every=1", "validation_documents=5")]
    return [*kept, *preset, "contrastive.weight=0.1", "horizon.tokens=16", "stage.evaluate.blocks=8"]


@pytest.fixture(scope="module")
def one_process(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    python(SGD, *settings, "trainer=cpu", "preset.accumulate=2", f"folder={folder}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["ddp", "fsdp"])
def test_two_processes_have_the_gradients_and_the_validation_of_one(choice, settings, one_process, tmp_path):
    folder = tmp_path / "run"
    shown = python(SGD, *settings, f"trainer={choice}", *TWO, "preset.accumulate=1", f"folder={folder}")
    one, two = (torch.load(path / "seen.pt", weights_only=True) for path in (one_process, folder))
    assert len(two["gradients"]) == 3
    for mine, theirs in zip(two["gradients"], one["gradients"], strict=True):
        for name, gradient in theirs.items():
            torch.testing.assert_close(mine[name], gradient, rtol=1e-6, atol=1e-6 * gradient.abs().max().item())
    assert len(two["dnll"]) == 3 and two["dnll"] != one["dnll"][:3]  # the other half was the other's
    expected, logged = rows(one_process, "val/dnll"), rows(folder, "val/dnll")
    assert [row.keys() for row in logged] == [row.keys() for row in expected] and len(logged) == 3
    for row, other in zip(logged, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-6, abs=1e-9)
    # What is logged while training is the mean over the processes.
    means = torch.stack(one["dnll"]).view(3, 2).mean(1)
    assert [row["train/dnll"] for row in rows(folder, "train/dnll")] == pytest.approx(means.tolist(), rel=1e-5)
    # One process writes and speaks.
    assert shown.count("Result on held-out documents") == shown.count("Everything is in") == 1
    assert shown.count("Device  CPU") == 1 and "2 processes" in shown
    assert (folder / "run.log").read_text().count("MFLOP per block") == 1
    assert [path.name for path in folder.parent.iterdir()] == ["run"]
    report = json.loads((folder / "report.json").read_text())
    assert report["blocks"] == json.loads((one_process / "report.json").read_text())["blocks"]


@pytest.mark.long
def test_a_run_of_two_processes_goes_on_exactly_where_it_stopped(settings, tmp_path):
    train = [REPOSITORY / "train.py", *settings, "trainer=ddp", *TWO, "gistnet.dropout=0.2"]
    train += ["preset.accumulate=2", "callbacks.checkpoint.save_top_k=-1"]
    python(*train, f"folder={tmp_path / 'a' / 'run'}")
    saved = tmp_path / "a" / "run" / "checkpoints"
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    straight = torch.load(saved / "last.ckpt", weights_only=True)
    states = [process["cpu"] for process in straight["callbacks"]["RandomState"]["processes"]]
    assert not torch.equal(*states)  # each drops out channels of its own
    shutil.copy(saved / "step_000001.ckpt", saved / "last.ckpt")  # as if the machine had failed after step 1
    (tmp_path / "a" / "run" / "done").unlink()
    assert "step 1" in python(*train, f"folder={tmp_path / 'a' / 'run'}", "resume=auto")
    resumed = torch.load(saved / "last.ckpt", weights_only=True)
    for name, value in straight["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["run"]
    before, after = (rows(tmp_path / side / "run", "step") for side in "ba")
    assert after == before and len(rows(tmp_path / "a" / "run", "train/dnll")) == 3


@pytest.mark.slow
def test_the_base_lm_stage_logs_the_same_for_two_processes_as_for_one(tiny_run, tmp_path):
    kept = [setting for setting in tiny_run if not setting.startswith(("trainer=", "+stage.config", "+datamodule"))]
    kept += ["+datamodule.validation_batches=3", "preset.steps=1", "preset.validate_every=1"]  # 2 and 1 per process
    assert run([*kept, "trainer=cpu", "preset.accumulate=2", f"folder={tmp_path / 'one'}"]) == 0
    python(REPOSITORY / "train.py", *kept, "trainer=ddp", *TWO, "preset.accumulate=1", f"folder={tmp_path / 'two'}")
    (one,), (two,) = (rows(tmp_path / name, "val/nll") for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-6)
    ((one, *_), (two, *_)) = (rows(tmp_path / name, "train/nll") for name in ("one", "two"))
    assert two["train/tokens"] == one["train/tokens"]  # a step has the same documents
    assert two["train/nll"] != one["train/nll"]
