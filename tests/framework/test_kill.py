"""A run that is killed goes on, when started again, to the weights of one that was not."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megactx.framework.app import run
from megactx.framework.files import PART

REPOSITORY = Path(__file__).parents[2]
KILLED = Path(__file__).with_name("killed.py")
# The step in which it is killed, and that of its last checkpoint by then.
MOMENTS = {"training": (5, 4), "validating": (4, 2), "saving": (4, 2)}
CLOCK = ("speed/",)  # metrics that are never the same twice
STEPS = 6


def python(*arguments) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)


def load(folder: Path, name: str) -> dict:
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def rows(folder: Path) -> list[dict]:
    """The log, without what a clock said and without empty cells."""
    with (folder / "metrics.csv").open(newline="") as file:
        found = [{k: v for k, v in row.items() if v and not k.startswith(CLOCK)} for row in csv.DictReader(file)]
    return [row for row in found if row.keys() != {"step"}]


def assert_same(one, other, where=""):
    """Nested dicts and lists with equal leaves, tensors bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, where


@pytest.fixture(scope="module")
def settings(gist_settings):
    """Muon, dropout, a contrastive term and accumulation: all that has a state."""
    own = ["batch=1", f"steps={STEPS}", "accumulate=2", "validation_documents=4"]
    return [
        *gist_settings,
        *(f"preset.{setting}" for setting in own),
        "gistnet.dropout=0.2",
        "contrastive.weight=0.1",
        "horizon.tokens=16",
        "stage.evaluate.blocks=8",
    ]


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory):
    folder, threads = tmp_path_factory.mktemp("uninterrupted") / "run", torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that are killed
    assert run([*settings, f"folder={folder}"]) == 0
    yield folder
    torch.set_num_threads(threads)


def kill(moment: str, settings: list[str], folder: Path) -> None:
    step, last = MOMENTS[moment]
    done = python(KILLED, moment, step, *settings, f"folder={folder}")
    assert done.returncode == -9, done.stderr
    saved = load(folder, "last.ckpt")["global_step"]  # whole, whatever was being written
    assert saved == last and not (folder / "done").exists()
    assert bool(list((folder / "checkpoints").glob(f"{PART}*"))) == (moment == "saving")


def assert_went_on(folder: Path, said: str, moment: str) -> None:
    step = MOMENTS[moment][1]
    assert f"Going on from {folder / 'checkpoints' / 'last.ckpt'}, step {step}" in said and "changed:" not in said


def assert_ended_alike(folder: Path, uninterrupted: Path) -> None:
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"best.ckpt", "last.ckpt", f"step_{STEPS:06d}.ckpt"}  # no leftover of the kill
    for name in ("best.ckpt", "last.ckpt"):
        one, other = load(uninterrupted, name), load(folder, name)
        for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
            assert_same(one[part], other[part], f"{name}.{part}")
        for callback in ("RandomState", "ValidationProtocol"):
            assert_same(one["callbacks"][callback], other["callbacks"][callback], f"{name}.{callback}")
    assert rows(folder) == rows(uninterrupted)
    assert (folder / "report.json").read_text() == (uninterrupted / "report.json").read_text()


@pytest.mark.slow
def test_a_run_that_was_killed_while_it_saved_goes_on_to_the_same_end(settings, uninterrupted, tmp_path, capsys):
    kill("saving", settings, tmp_path / "run")
    capsys.readouterr()
    assert run([*settings, f"folder={tmp_path / 'run'}", "resume=auto"]) == 0
    assert_went_on(tmp_path / "run", capsys.readouterr().out, "saving")
    assert_ended_alike(tmp_path / "run", uninterrupted)
    assert len([row for row in rows(uninterrupted) if "train/loss" in row]) == STEPS  # it logs every step
    assert len([row for row in rows(uninterrupted) if "val/dnll" in row]) == STEPS // 2
    assert len([row for row in rows(uninterrupted) if "val/dnll_ema" in row]) == STEPS // 2 - 1


@pytest.mark.parametrize(  # saving in the process is the test above
    ("moment", "workers"),
    [
        pytest.param("training", 2, marks=pytest.mark.slow),
        *(pytest.param(*pair, marks=pytest.mark.long) for pair in (("training", 0), ("validating", 2), ("saving", 2))),
    ],
)
def test_wherever_a_run_is_killed_it_goes_on_to_the_same_end(moment, workers, settings, uninterrupted, tmp_path):
    workers = f"data.workers={workers}"
    kill(moment, [*settings, workers], tmp_path / "run")
    done = python(REPOSITORY / "train.py", *settings, workers, f"folder={tmp_path / 'run'}", "resume=auto")
    assert done.returncode == 0, done.stderr
    assert_went_on(tmp_path / "run", done.stdout, moment)
    assert_ended_alike(tmp_path / "run", uninterrupted)
