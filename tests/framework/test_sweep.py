import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megactx.framework.app import run
from megactx.framework.errors import composition_message
from megactx.framework.sweep import jobs

REPOSITORY = Path(__file__).parents[2]
TRAIN = [sys.executable, str(REPOSITORY / "train.py")]


def short_names(overrides: list[str]) -> list[str]:
    """The overrides, and that none of them belongs into the names of the jobs' folders: paths are long."""
    keys = ",".join(override.partition("=")[0].lstrip("+") for override in overrides)
    return [*overrides, f"hydra.job.config.override_dirname.exclude_keys=[{keys}]"]


@pytest.fixture
def begun(tmp_path):
    """A sweep that this process has begun, with a report that notes what it is given."""
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / "s")}, "launcher": {"_target_": "basic"}}})
    jobs.RememberFolder(f"{__name__}.remember").on_multirun_start(config)
    yield tmp_path / "s"
    jobs._now = None
    os.environ.pop("MEGACTX_SWEEP", None)


given = []


def remember(folders, out):
    given.append(([folder.name for folder in folders], out.name))


def outcome(folder: Path, code, state="done", overrides=(), of=None, message=""):
    folder.mkdir(parents=True, exist_ok=True)
    told = dict(sweep=of or os.environ["MEGACTX_SWEEP"], overrides=list(overrides), state=state, code=code)
    (folder / "outcome.json").write_text(json.dumps(told | dict(message=message, value=None)))


@pytest.fixture
def reported():
    """What the report was given so far."""
    given.clear()
    return given


def test_the_table_names_jobs_by_the_overrides_in_which_they_differ(begun, reported, capsys):
    shared = ["experiment=demo", "data.path=/a/long/path/that/says/nothing"]
    outcome(begun / "a", 0, overrides=[*shared, "depth=d1"])
    outcome(begun / "b", 0, "done before", overrides=[*shared, "depth=d2"])
    assert jobs.summary() == 0
    shown = capsys.readouterr().out
    assert "depth=d1" in shown and "done before" in shown and "long/path" not in shown and "experiment" not in shown


def test_a_failed_job_gives_the_code_and_its_message_and_the_leaderboard_comes_all_the_same(begun, reported, capsys):
    outcome(begun / "a", 0, overrides=["depth=d1"])
    outcome(begun / "b", 3, "failed", ["depth=d2"], message="the loss is NaN\nmore")
    assert jobs.summary() == 3
    shown = capsys.readouterr().out
    assert "the loss is NaN" in shown and "more" not in shown
    assert reported == [(["a", "b"], "s")]


def test_a_job_that_ended_without_a_word_counts_as_failed(begun, reported, capsys):
    outcome(begun / "a", None, "running", ["depth=d1"])
    assert jobs.summary() == 3
    assert "ended without a word" in capsys.readouterr().out


def test_jobs_of_earlier_starts_in_the_same_folder_do_not_count(begun, reported):
    outcome(begun / "a", 0, overrides=["depth=d1"])
    outcome(begun / "old", 3, "failed", ["depth=d2"], of="another start")
    assert jobs.summary() == 0
    assert reported == [(["a"], "s")]


def test_a_leaderboard_that_cannot_be_made_is_said_and_counts(begun, reported, monkeypatch, capsys):
    def broken(folders, out):
        raise RuntimeError("no")

    monkeypatch.setattr(sys.modules[__name__], "remember", broken)
    outcome(begun / "a", 0, overrides=["depth=d1"])
    assert jobs.summary() == 3
    captured = capsys.readouterr()
    assert "no leaderboard: RuntimeError: no" in captured.err and "depth=d1" in captured.out


def test_a_summary_is_given_once_and_leaves_nothing_behind(begun, reported, capsys):
    outcome(begun / "a", 3, "failed", ["depth=d1"])
    assert jobs.begun() and jobs.jobs_begun()
    assert jobs.summary() == 3
    capsys.readouterr()
    assert jobs.summary() == 0 and capsys.readouterr().out == ""
    assert not jobs.begun() and "MEGACTX_SWEEP" not in os.environ


@pytest.mark.parametrize(
    ("launcher", "sweeper", "count"),
    [
        ({"_target_": "a.JoblibLauncher", "n_jobs": 2}, {}, 2),
        ({"_target_": "a.JoblibLauncher", "n_jobs": -1}, {}, None),
        ({"_target_": "submitit_launcher.LocalLauncher", "submitit_folder": "x/%j"}, {"max_batch_size": 2}, 2),
        ({"_target_": "submitit_launcher.LocalLauncher", "submitit_folder": "x/%j"}, {"max_batch_size": None}, None),
    ],
)
def test_jobs_that_run_at_once_share_the_cores(tmp_path, monkeypatch, launcher, sweeper, count):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}, "launcher": launcher, "sweeper": sweeper}})
    OmegaConf.set_struct(config, True)
    jobs.RememberFolder("a.b").on_multirun_start(config)
    assert os.environ["OMP_NUM_THREADS"] == str(max(1, cores // (count or cores)))
    if sweeper:
        assert config.hydra.sweeper.max_batch_size == (count or cores)
    jobs.summary()
    assert "OMP_NUM_THREADS" not in os.environ


def folder_of(*overrides: str) -> str:
    """The folder that Hydra would give to a job with these overrides."""
    from hydra._internal.config_loader_impl import get_overrides_dirname
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from megactx.framework.config.search_path import compose

    cfg = compose(overrides, with_hydra=True)
    excluded = list(cfg.hydra.job.config.override_dirname.exclude_keys)
    cfg.hydra.job.override_dirname = get_overrides_dirname(
        OverridesParser.create().parse_overrides(list(overrides)), excluded, "__", "-"
    )
    cfg.hydra.overrides.task = list(overrides)
    return cfg.hydra.sweep.subdir


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["data.path=c/a_b"], ["data.path=c/a/b"]),
        (["data.path=c_a"], ["data.path=c/a"]),
        (["data.path='a b'"], ["data.path=ab"]),
        (["data.path='a  b'"], ["data.path='a b'"]),
        (["name=a-b"], ["name='a=b'"]),
        (["name='a__seed-1'", "seed=2"], ["name=a", "seed=1"]),
        (["name=" + "a" * 130 + "/b"], ["name=" + "a" * 130 + "_b"]),
    ],
)
def test_jobs_that_differ_have_folders_that_differ(one, other):
    names = [folder_of("data=files", *overrides) for overrides in (one, other)]
    assert names[0] != names[1] and not any("/" in name or len(name.encode()) > 255 for name in names)


def test_a_job_has_the_same_folder_at_the_second_start_and_a_plain_name_where_it_can():
    assert folder_of("seed=1", "stage.muon_lr=-1") == "seed-1__stage.muon_lr--1"
    again = folder_of("data=files", "data.path=c/a", "resume=auto", "logger=none")
    assert folder_of("data=files", "data.path=c/a") == again
    assert len(folder_of("name='" + "\N{CJK UNIFIED IDEOGRAPH-4E00}" * 100 + "'").encode()) <= 255


@pytest.mark.slow
def test_a_job_that_is_done_is_refused_where_an_edited_experiment_would_give_another_result(
    tiny_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "mine" / "experiment"
    own.mkdir(parents=True)
    rest = [override for override in tiny_run if override != "experiment=base_lm"]

    def sweep_with(steps: int, lr: float) -> int:
        head = "# @package _global_\ndefaults: [base_lm, _self_]\n"
        (own / "mine.yaml").write_text(f"{head}stage: {{muon_lr: {lr}}}\n")
        return run(["--config-dir", "mine", "-m", "experiment=mine", *short_names(rest), "seed=0"])

    def outcomes() -> str:
        return json.loads(next((tmp_path / "runs" / "sweep").glob("*/outcome.json")).read_text())["state"]

    rest = [override.replace("preset.steps=4", "preset.steps=2") for override in rest]
    assert sweep_with(2, 0.01) == 0 and outcomes() == "done"
    assert sweep_with(2, 0.01) == 0 and outcomes() == "done before"
    capsys.readouterr()
    assert sweep_with(2, 0.02) == 2 and outcomes() == "refused"
    assert "was done otherwise: stage.muon_lr: 0.01 -> 0.02" in capsys.readouterr().err
    monkeypatch.setattr(jobs, "_now", None)
    rest = [override.replace("preset.steps=2", "preset.steps=3") for override in rest]
    assert sweep_with(3, 0.01) == 2
    assert "preset.steps: 2 -> 3" in capsys.readouterr().err  # results of two steps are none of three


@pytest.mark.slow
def test_a_job_that_is_done_is_refused_where_its_texts_or_its_base_are_other_ones_now(
    gist_sweep, tmp_path, monkeypatch, capsys
):
    from safetensors.torch import load_file, save_file

    from megactx.assets import resolve

    monkeypatch.chdir(tmp_path)
    (path,) = [o.partition("=")[2] for o in gist_sweep if o.startswith("data.path=")]
    shutil.copytree(path, "texts")
    shutil.copytree(resolve("asset:tiny-base"), "own")
    rest = [o for o in gist_sweep if not o.startswith("data.path=")]
    command = ["-m", *rest, "data.path=texts", "base=hf", "base.name=own", "seed=0"]
    assert run(command) == 0 and run(command) == 0
    one = sorted(Path("texts").iterdir())[0]
    state, text = one.stat(), one.read_text()
    one.write_text(text.replace("e", "a"))  # of the same size
    os.utime(one, ns=(state.st_atime_ns, state.st_mtime_ns))
    capsys.readouterr()
    assert run(command) == 2
    assert "was done otherwise: the texts of data.source: fingerprint" in capsys.readouterr().err
    one.write_text(text)
    weights = load_file("own/model.safetensors")
    changed = {name: value * 1.05 if "mlp" in name else value for name, value in weights.items()}
    save_file(changed, "own/model.safetensors", metadata={"format": "pt"})
    assert run(command) == 2
    assert "own has other weights now. Remove it" in capsys.readouterr().err
    shutil.rmtree("texts")
    shutil.rmtree("own")  # what is gone contradicts nothing
    assert run(command) == 0


def test_a_checkpoint_for_all_jobs_of_a_sweep_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["-m", "experiment=base_lm", "seed=0,1", "resume=last.ckpt"]) == 2
    assert "resume=last.ckpt is not allowed with -m" in capsys.readouterr().err


def test_a_second_process_waits_for_the_one_that_is_at_a_job(tmp_path):
    program = "import sys; from pathlib import Path; from megactx.framework.sweep.jobs import alone\n"
    program += "with alone(Path(sys.argv[1])): print((Path(sys.argv[1]) / 'done').exists())"
    with jobs.alone(tmp_path / "job"):
        command = [sys.executable, "-c", program, str(tmp_path / "job")]
        second = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert "another process is at" in second.stderr.readline()
        (tmp_path / "job" / "done").touch()
    out, _ = second.communicate(timeout=60)
    assert out == "True\n" and second.returncode == 0


@pytest.mark.slow
def test_a_run_after_a_sweep_in_the_same_process_prints_no_old_table(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["-m", *short_names(tiny_run), "preset.steps=2", "seed=0"]) == 0
    assert "Sweep in" in capsys.readouterr().out
    assert run([*tiny_run, "preset.steps=2", "folder=a"]) == 0
    assert "Sweep in" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_job_returns_the_lowest_value_of_what_its_stage_monitors_also_when_it_is_done_before(
    gist_sweep, tmp_path, monkeypatch
):
    import torch

    monkeypatch.chdir(tmp_path)
    values = []
    for _ in range(2):
        assert run(["-m", *gist_sweep, "seed=0"]) == 0
        (found,) = (tmp_path / "runs" / "sweep").glob("*/outcome.json")
        values.append(json.loads(found.read_text()))
    saved = torch.load(found.parent / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    (best,) = [state for name, state in saved.items() if name.startswith("Best")]
    assert values[0]["value"] == values[1]["value"] == float(best["best_model_score"])
    assert [value["state"] for value in values] == ["done", "done before"]


@pytest.fixture(scope="module")
def gist_sweep(tmp_path_factory):
    """Overrides of a gist run of a few seconds, on the embedded base."""
    import sysconfig

    library, folder = Path(sysconfig.get_path("stdlib")), tmp_path_factory.mktemp("texts")
    for path in sorted(library.glob("*.py"))[:60]:
        text = path.read_text(encoding="utf-8")[:6000]
        if len(text) > 3000:
            (folder / path.name).write_text(text)
    settings = ["experiment=demo", "data=files", f"data.path={folder}", "depth=d1", "pooling=mean"]
    settings += ["data.weights={narrative: 0, code: 1, structured: 0}", "preset.steps=2", "preset.warmup=1"]
    settings += ["preset.spans=3", "preset.validate_every=1", "preset.validation_documents=2", "trainer=cpu"]
    settings += ["preset.min_tokens=200", "preset.max_tokens=256", "stage.evaluate.blocks=24"]
    return short_names([*settings, "trainer.precision=32-true", "stage.controls={blockmean_linear: null}"])


def start(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    return subprocess.run([*TRAIN, *overrides], cwd=folder, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_where_it_was(tiny_run, tmp_path):
    command = ["-m", *short_names([*tiny_run, "preset.steps=40"]), "seed=0,1,2"]
    folder = tmp_path / "runs" / "sweep"
    with subprocess.Popen([*TRAIN, *command], cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 300
        while not (folder / "seed-1" / "checkpoints" / "last.ckpt").exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert (folder / "seed-0" / "done").exists() and not (folder / "seed-1" / "done").exists()
    first = (folder / "seed-0" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    again = start(tmp_path, *command)
    assert again.returncode == 0, again.stderr
    (went_on,) = [line for line in again.stdout.splitlines() if line.startswith("Going on from")]
    assert "seed-1" in went_on
    states = [json.loads((folder / f"seed-{seed}" / "outcome.json").read_text())["state"] for seed in range(3)]
    assert states == ["done before", "done", "done"]
    assert (folder / "seed-0" / "checkpoints" / "last.ckpt").stat().st_mtime_ns == first


@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "plugin"),
    [
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], "hydra_joblib_launcher"),
        (["hydra/launcher=submitit_local", "hydra.sweeper.max_batch_size=2"], "hydra_submitit_launcher"),
    ],
    ids=["joblib", "submitit_local"],
)
def test_a_launcher_runs_jobs_at_once_hides_no_failure_and_skips_what_is_done(gist_sweep, tmp_path, launcher, plugin):
    pytest.importorskip(f"hydra_plugins.{plugin}", reason=f"{plugin} is not installed (the extra sweep)")
    command = ["-m", *gist_sweep, "gistnet.head=linear,none_such", *launcher]
    # A second start costs as much again, and is the same for all launchers.
    for state in ("done", "done before") if "submitit" in plugin else ("done",):
        ended = start(tmp_path, *command)
        assert ended.returncode == 2, ended.stderr
        assert "Warning" not in ended.stderr
        folder = tmp_path / "runs" / "sweep"
        told = [json.loads((job / "outcome.json").read_text()) for job in sorted(folder.glob("gistnet*"))]
        assert [one["state"] for one in told] == [state, "failed"]
        assert "gistnet.head=none_such is not known" in ended.stdout.partition("Sweep in")[2]
        assert "leaderboard: 1 run," in ended.stdout
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS", max(1, cores // 2))
    assert f"CPU ({threads} threads)" in (folder / "gistnet.head-linear" / "run.yaml").read_text()
    assert (folder / "leaderboard.png").exists()
    assert (folder / ".submitit").exists() == ("submitit" in plugin)


@pytest.mark.long
def test_optuna_minimises_what_the_stage_monitors_and_goes_on_with_the_same_trials_after_a_kill(gist_sweep, tmp_path):
    reason = "hydra_optuna_sweeper is not installed (the extra optuna)"
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason=reason)
    chosen = [override.replace("experiment=demo", "experiment=sweep_optuna") for override in gist_sweep]
    command, folder = [*chosen, "hydra.sweeper.n_trials=3"], tmp_path / "runs" / "sweep_optuna"
    with subprocess.Popen([*TRAIN, *command], cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 600
        while len(list(folder.glob("*/outcome.json"))) < 2:  # the second trial has begun
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    begun = {path.parent.name for path in folder.glob("*/outcome.json")}
    (done,) = folder.glob("*/done")
    value = json.loads((done.parent / "outcome.json").read_text())["value"]
    ended = start(tmp_path, *command)
    assert ended.returncode == 0, ended.stderr
    told = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/outcome.json")}
    assert len(told) == 3 and begun <= set(told)  # the trials are the same ones
    assert sorted(one["state"] for one in told.values()) == ["done", "done", "done before"]
    assert told[done.parent.name] | {"value": value} == told[done.parent.name]
    best = OmegaConf.load(folder / "optimization_results.yaml")
    assert best.best_value == min(one["value"] for one in told.values())


def test_a_store_of_the_sweeper_is_refused_with_the_way_to_go_on_without_one():
    store = "hydra.sweeper.storage=sqlite:///study.db"
    for error in (AssertionError(), ModuleNotFoundError("No module named 'sqlalchemy'")):  # what such a study ends with
        told = composition_message(error, ["experiment=sweep_optuna", "hydra.sweeper.n_trials=2", store])
        assert told.startswith(f"{store}: a store of the sweeper cannot be used") and "SQLAlchemy below 2" in told
        assert "a second start goes on by the folders of its jobs" in told
        assert "store" not in composition_message(error, ["experiment=sweep_optuna", "hydra.sweeper.storage=null"])
    told = composition_message(ModuleNotFoundError("No module named 'scipy'"), [store])
    assert "scipy" in told and "SQLAlchemy" not in told


def test_a_store_of_the_sweeper_hides_no_other_mistake(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["experiment=demo", "preset.stepz=3", "+hydra.sweeper.storage=sqlite:///study.db"]) == 2
    err = capsys.readouterr().err
    assert "preset.stepz" in err and "SQLAlchemy" not in err
