"""Every logger writes in the run folder only, and a resumed run continues what the stopped one began."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megactx.framework.app import run
from megactx.framework.errors import MISTAKE, verdict

REPOSITORY = Path(__file__).parents[2]
SECRET = "+stage.config.api_key=hush"

# Runs to step 8, goes back to what was there after step 4, goes on; then a sweep of two jobs.
WANDB_PROGRAM = """
import json, pathlib, shutil, sys
from megactx.framework.app import run
settings = json.loads(sys.argv[1])
settings += ["logger=wandb", "folder=a", "preset.steps=8", "callbacks.checkpoint.save_top_k=-1"]
assert run(settings) == 0
saved = pathlib.Path("a/checkpoints")
shutil.copy(saved / "step_000004.ckpt", saved / "last.ckpt")
pathlib.Path("a/done").unlink()
assert run([*settings, "resume=auto"]) == 0
names = [s.partition("=")[0].lstrip("+") for s in settings]
named = "hydra.job.config.override_dirname.exclude_keys=" + json.dumps(names)
sweep = [s for s in settings if not s.startswith("folder=")]
assert run(["-m", *sweep, "preset.steps=2", "hydra.sweep.dir=sweep", named, "seed=0,1"]) == 0
"""


@pytest.mark.slow
def test_tensorboard_continues_its_curves_in_the_run_folder_and_shows_the_settings(tiny_run, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    settings = [*tiny_run, SECRET, "logger=tensorboard", "folder=a", "callbacks.checkpoint.save_top_k=-1"]
    assert run(settings) == 0
    saved = tmp_path / "a" / "checkpoints"
    shutil.copy(saved / "step_000002.ckpt", saved / "last.ckpt")
    (tmp_path / "a" / "done").unlink()
    assert run([*settings, "resume=auto"]) == 0
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    events.Reload()
    assert {e.step for e in events.Scalars("train/nll")} == {0, 1, 2, 3}
    assert {"val/nll", "lr/muon", "lr/adamw", "grad_norm/base", "speed/tokens_per_second"} <= set(
        events.Tags()["scalars"]
    )
    shown = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "muon_lr: 0.015" in shown and "api_key: (hidden)" in shown
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert not any(b"hush" in p.read_bytes() for p in (tmp_path / "a" / "tensorboard").iterdir())


def _records(data: bytes) -> Iterator[bytes]:
    """Of LevelDB's log behind a header of 7 bytes: blocks of 32 KiB, pieces of records with CRC, length, kind."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too small for a piece
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


def _history(path: Path) -> dict[int, str]:
    """Optimizer step -> training loss, as a ``.wandb`` file has them."""
    from wandb.proto import wandb_internal_pb2

    found = {}
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        if "train/nll" in items:
            found[int(items["trainer/global_step"])] = items["train/nll"]
    return found


@pytest.mark.slow
def test_wandb_makes_one_run_per_folder_offline_and_a_resumed_run_keeps_its_id(tiny_run, tmp_path):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir(), work.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "XDG"))}
    environment |= {"HOME": str(home), "TMPDIR": str(tmp_path), "MPLCONFIGDIR": str(tmp_path / "matplotlib")}
    environment |= {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", WANDB_PROGRAM, json.dumps([*tiny_run, SECRET])]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    ids = {}
    for folder in (work / "a", work / "sweep" / "seed-0", work / "sweep" / "seed-1"):
        ids[folder.name] = (folder / "wandb_id").read_text()
        runs = [p.name for p in (folder / "wandb").glob("offline-run-*")]
        assert len(runs) == (2 if folder.name == "a" else 1), runs
        assert all(name.endswith(f"-{ids[folder.name]}") for name in runs)
    assert len(set(ids.values())) == 3
    assert sorted(p.name for p in work.iterdir()) == ["a", "sweep"]
    assert not [p for p in home.rglob("*") if "wandb" in p.name]
    # Synced in the order of their start, fragments of one id are one run: whatever a fragment repeats is the same.
    first, second = (_history(path) for path in sorted((work / "a").rglob("*.wandb")))
    assert {*first} == {*range(8)} and {*second} == {*range(4, 8)}
    assert all(first[step] == second[step] for step in second)
    records = [p.read_bytes() for p in work.rglob("*.wandb")]
    assert len(records) == 4 and all(b"train/nll" in r and b"muon_lr" in r for r in records)
    assert not any(b"hush" in p.read_bytes() for p in work.glob("**/wandb/**/*") if p.is_file())


KEEP_PROGRAM = """
import pathlib
from megactx.framework.callbacks.logs import Wandb
folder = pathlib.Path("run")
(folder / "config.yaml").write_text("seed: 0")
logger = Wandb("run", "megactx")
logger.log_metrics({"val/dnll": 0.5}, step=1)
logger.keep(folder)
logger.experiment.finish()
"""


@pytest.mark.slow
def test_a_report_is_made_again_from_what_weights_and_biases_has_of_a_run(tmp_path, monkeypatch, capsys):
    from megactx.evaluation import page
    from megactx.evaluation.table import Report, Sheet, Table

    table, run_folder = Table(), tmp_path / "run"
    table.add("recovery", {"point": 0.5, "low": 0.4, "high": 0.6}, carrier="gistnet", n=7)
    run_folder.mkdir()
    sheet = Sheet("How <good>", ["", "recovery"], [["gistnet", "0.50"], ["last token", "0.40"]], (0,))
    made = Report("A report", table, [sheet], "In shares.", ["a note"], draw=lambda path: path.write_bytes(b"png"))
    made.write(run_folder / "report")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", KEEP_PROGRAM], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]

    (kept,) = (run_folder / "wandb").glob("offline-run-*")
    elsewhere = tmp_path / "downloaded"
    assert not [path for path in (kept / "files").rglob("*") if path.is_symlink()]  # the folder may move
    shutil.copytree(kept / "files", elsewhere)
    shutil.rmtree(run_folder / "wandb")
    (elsewhere / "report.md").unlink()
    assert page.main([str(elsewhere)]) == 0
    assert "A report" in capsys.readouterr().out
    assert (elsewhere / "report.md").read_text() == (run_folder / "report.md").read_text() == made.markdown()
    html = (elsewhere / "report.html").read_text()
    assert "How &lt;good&gt;" in html and 'src="report.png"' in html and (elsewhere / "report.png").exists()
    assert Report.read(elsewhere / "report").table == table
    assert list((elsewhere / "media" / "table" / "report").glob("*.json"))
    for wrong, said in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "nothing in it was reported")):
        assert page.main([str(wrong)]) == MISTAKE
        assert said in capsys.readouterr().err
    (run_folder / "report.json").write_text("{}")
    assert page.main([str(run_folder)]) == 0  # what was written is there
    (run_folder / "report.md").unlink()
    assert page.main([str(run_folder)]) == MISTAKE
    assert "there is no report in it" in capsys.readouterr().err


@pytest.mark.slow
def test_wandb_that_sends_without_a_key_is_a_users_mistake_that_says_what_to_do(tiny_run, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(tmp_path)}
    command = [sys.executable, str(REPOSITORY / "train.py"), *tiny_run, "logger=wandb", "logger.wandb.offline=false"]
    command.append(f"folder={tmp_path / 'a'}")
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == MISTAKE, done.stderr[-3000:]
    assert "logger.wandb.offline=true" in done.stderr and "Traceback" not in done.stderr


def test_wandbs_own_errors_have_their_codes():
    from wandb.errors import CommError, UsageError

    assert verdict(UsageError("api_key not configured"))[0] == MISTAKE
    assert verdict(CommError("no route"))[0] != MISTAKE


def test_csv_keeps_its_rows_and_columns_when_a_run_goes_on_with_more_metrics(tmp_path):
    from megactx.framework.callbacks.logs import CSV

    first = CSV(str(tmp_path))
    first.log_metrics({"a": 1.0}, step=0)
    first.save()
    second = CSV(str(tmp_path))
    second.log_metrics({"a": 2.0, "b": 3.0}, step=1)
    second.save()
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["step"], r["a"], r["b"]) for r in rows] == [("0", "1.0", ""), ("1", "2.0", "3.0")]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_run_that_is_shorter_than_the_logs_stride_has_a_row_of_its_training(tiny_run, tmp_path):
    assert run([*tiny_run, f"folder={tmp_path / 'run'}", "trainer.log_every_n_steps=1000"]) == 0
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        assert any(value for row in csv.DictReader(file) for key, value in row.items() if key.startswith("train/"))


def test_callbacks_full_logs_the_device_too(tiny_run, tmp_path):
    assert run([*tiny_run, "callbacks=full", "preset.steps=2", f"folder={tmp_path / 'a'}"]) == 0
    with (tmp_path / "a" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = {name for row in rows for name, value in row.items() if value}
    assert {"lr/muon", "grad_norm/base", "speed/tokens_per_second"} <= names
    assert any(name.startswith("DeviceStatsMonitor") and "cpu" in name for name in names)


@pytest.mark.parametrize(
    ("torn", "steps", "kept"), [("", 9, [0, 1, 1, 2]), ("", 2, [0, 1, 1]), ("7,1", 9, [0, 1, 1, 2])]
)
def test_a_log_is_rewound_to_its_first_steps_without_what_a_kill_has_cut(tmp_path, torn, steps, kept):
    from megactx.framework.callbacks.logs import CSV

    first = CSV(tmp_path)
    for step, metrics in ((0, {"loss": 1.0}), (1, {"loss": 2.0}), (1, {"val": 3.0}), (2, {"loss": 4.0})):
        first.log_metrics(metrics, step)  # in the file at once: nobody calls save on a run that is killed
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write(torn)
    second = CSV(tmp_path)
    second.rewind(steps)
    second.log_metrics({"loss": 5.0, "other": 6.0}, 8)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [*kept, 8]
    assert rows[2]["val"] == "3.0" and rows[-1]["other"] == "6.0"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_there_is_nothing_to_rewind_in_a_new_folder(tmp_path):
    from megactx.framework.callbacks.logs import CSV

    CSV(tmp_path).rewind(3)
    assert not (tmp_path / "metrics.csv").exists()
