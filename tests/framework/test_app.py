import csv
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from megactx.framework.app import _flags_first, _how_to_go_on, run
from megactx.framework.run.runfolder import held

REPOSITORY = Path(__file__).parents[2]


def load(folder: Path, name: str = "last.ckpt") -> dict:
    return torch.load(folder / "checkpoints" / name, weights_only=True)


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "a"
    assert run([*tiny_run, f"folder={folder}", "+stage.config.api_key=hush", "preset.steps=8"]) == 0
    return folder


def test_a_run_keeps_its_record_in_its_folder(finished):
    config = OmegaConf.load(finished / "config.yaml")
    assert config.preset.steps == config.stage.max_steps == 8
    assert "hush" not in "".join(p.read_text() for p in finished.iterdir() if p.is_file())
    record = OmegaConf.load(finished / "run.yaml")
    assert record.packages.torch == torch.__version__ and "CPU" in record.device
    assert (finished / "done").exists() and (finished / "run.log").exists()
    assert "val/nll" in (finished / "metrics.csv").read_text()


def test_checkpoints_hold_plain_dicts_and_tensors_with_the_resolved_config(finished):
    assert {p.name for p in (finished / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "step_000008.ckpt"}
    checkpoint = load(finished)  # weights_only: anything but plain content would be refused
    assert checkpoint["config"]["preset"]["steps"] == 8
    assert checkpoint["hyper_parameters"]["config"]["hidden_size"] == 32
    from megactx.stages.base_lm import BaseLMStage

    stage = BaseLMStage.load_from_checkpoint(finished / "checkpoints" / "last.ckpt", weights_only=True)
    assert stage.base.width == 32


def test_a_stopped_run_goes_on_in_its_folder_to_the_same_weights_bit_for_bit(tiny_run, finished, tmp_path, capsys):
    settings = [*tiny_run, "+stage.config.api_key=hush", f"folder={tmp_path / 'b'}", "preset.steps=8"]
    settings += ["callbacks.checkpoint.save_top_k=-1"]
    assert run(settings) == 0
    saved = tmp_path / "b" / "checkpoints"
    shutil.copy(saved / "step_000004.ckpt", saved / "last.ckpt")  # as if the machine had failed after step 4
    (tmp_path / "b" / "done").unlink()
    assert run([*settings, "resume=auto"]) == 0
    out = capsys.readouterr().out
    assert "Going on from" in out and "changed:" not in out
    straight, resumed = load(finished)["state_dict"], load(tmp_path / "b")["state_dict"]
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    with (tmp_path / "b" / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/nll"]]
    assert steps == [*range(8)]  # nothing logged before the stop is lost, and no step is there twice


@pytest.mark.slow
def test_a_finished_run_made_longer_logs_each_step_under_its_own_number(tiny_run, tmp_path):
    settings = [*tiny_run, f"folder={tmp_path / 'a'}", "resume=auto", "preset.validate_every=2"]
    for steps in (2, 4):
        assert run([*settings, f"preset.steps={steps}"]) == 0
    with (tmp_path / "a" / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["train/nll"]] == [0, 1, 2, 3]


def test_a_second_start_in_a_folder_in_which_a_run_trains_is_refused(tiny_run, tmp_path, capsys):
    with held(tmp_path / "a"):
        assert run([*tiny_run, f"folder={tmp_path / 'a'}", "resume=auto"]) == 2
    said = capsys.readouterr().err
    assert f"another process ({os.getpid()}) trains in it" in said and "resume=never" in said
    assert not (tmp_path / "a" / "run.yaml").exists()


@pytest.mark.parametrize("stage", ["tokenizer", "base_lm"])
@pytest.mark.parametrize("resume", ["never", "auto"])
def test_the_tokenizer_is_not_written_over_and_nothing_else_starts_in_its_folder(
    tiny_run, tmp_path, capsys, stage, resume
):
    (tmp_path / "tokenizer").mkdir(parents=True)
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("mine")
    (tmp_path / "done").touch()
    data = [override for override in tiny_run if override.startswith("data")][:2]
    chosen = ["experiment=tokenizer", *data] if stage == "tokenizer" else tiny_run
    assert run([*chosen, f"folder={tmp_path}", f"resume={resume}"]) == 2
    assert "it holds a finished run; use another folder" in capsys.readouterr().err
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_text() == "mine" and (tmp_path / "done").exists()


def test_a_flag_between_two_overrides_means_what_it_means_before_them():
    assert _flags_first(["experiment=demo", "-m", "seed=0,1"]) == ["-m", "experiment=demo", "seed=0,1"]
    assert _flags_first(["seed=0", "--cfg", "job"]) == ["seed=0", "--cfg", "job"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            ["data=files", "data.path=x,y"],
            """-m starts; for one value with a comma quote it twice: 'data.path="x,y"'""",
        ),
        (["~trainer"], "trainer: it is gone, and every run needs it; leave ~trainer out"),
        (["~base"], "base: it is gone"),
        (["curriculum=[tokenizer,lens]", "preset=demo"], "curriculum: lens takes "),
        (["curriculum=[gist_stage1,gist_stage1]"], "each experiment runs once"),
    ],
)
def test_a_mistake_is_one_message_that_can_be_followed(wrong, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(wrong) == 2
    shown = capsys.readouterr().err
    assert said in shown and len(shown.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.yaml"))


def test_how_to_go_on_can_be_pasted_into_a_shell(tmp_path):
    (tmp_path / "last.ckpt").touch()
    said = _how_to_go_on("interrupted", [tmp_path], ["data.weights={code: 1}", "data.path='a b'", "resume=never"])
    command = shlex.split(said.partition("Go on with: ")[2])
    assert command == ["python", "train.py", "data.weights={code: 1}", "data.path='a b'", "resume=auto"]


def test_a_nan_loss_ends_the_run_with_code_3_and_leaves_good_weights(tiny_run, tmp_path, capsys):
    assert run([*tiny_run, f"folder={tmp_path / 'a'}", "stage.adamw_lr=1e30", "preset.validate_every=1"]) == 3
    said = capsys.readouterr().err
    assert "stage.muon_lr, stage.adamw_lr" in said and "NaN" in said and "Traceback" not in said
    assert all(torch.isfinite(value).all() for value in load(tmp_path / "a")["state_dict"].values())
    assert "RunFailed" in (tmp_path / "a" / "error.txt").read_text()
    assert not (tmp_path / "a" / "done").exists()


def test_a_users_mistake_in_building_ends_with_code_2_one_message_and_a_traceback_in_the_folder(
    tiny_run, tmp_path, capsys
):
    assert run([*tiny_run, f"folder={tmp_path / 'a'}", "stage.config.num_attention_heads=5"]) == 2
    said = capsys.readouterr().err
    assert "num_attention_heads=5" in said and "Traceback" not in said
    assert "ValueError" in (tmp_path / "a" / "error.txt").read_text()


def test_a_folder_without_a_name_is_refused_and_the_one_that_one_works_in_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["experiment=base_lm", "folder="]) == 2
    assert "folder=: it is empty" in capsys.readouterr().err
    assert tmp_path.is_dir() and not [*tmp_path.iterdir()]


def test_a_refused_config_leaves_no_folder_behind(tiny_run, tmp_path, capsys):
    assert run([*tiny_run, f"folder={tmp_path / 'a'}", "+lrr=1", "+gistnet.haed=mlp"]) == 2
    said = capsys.readouterr().err
    assert "lrr: no such setting" in said and "Did you mean gistnet.head?" in said
    assert not (tmp_path / "a").exists()


def test_a_fresh_start_does_not_write_over_a_run(tiny_run, finished, capsys):
    before = load(finished)["global_step"]
    assert run([*tiny_run, f"folder={finished}"]) == 2
    assert "resume=auto" in capsys.readouterr().err
    assert load(finished)["global_step"] == before and (finished / "done").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("gistnet.haed=mlp", "Did you mean gistnet.head"),
        ("experiment=bse_lm", "Did you mean experiment=base_lm?"),
        ("depth=4", "There is d1, d2, d4"),
        ("gistnt=default", "Did you mean gistnet"),
        ("trainer.limit_val_batches=2", "+trainer.limit_val_batches"),
        ("preset.steps=[1", "preset.steps=[1"),
    ],
)
def test_what_hydra_cannot_compose_is_said_in_one_line_with_what_may_have_been_meant(wrong, said, capsys):
    assert run([wrong]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and len(captured.err.strip().splitlines()) == 1


def test_config_and_typos_answer_without_importing_torch(tmp_path):
    program = (
        "import sys; from megactx.framework.app import run\n"
        "assert run(['--cfg', 'job', 'experiment=base_lm', '+data.api_key=hush']) == 0\n"
        "assert run(['experiment=base_lm', 'sede=1']) == 2\n"
        "assert run(['--help']) == 0\n"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "hush" not in done.stdout and "api_key: (hidden)" in done.stdout
    assert "Did you mean seed?" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("asked", [["--help"], ["--cfg", "job"]])
def test_a_reader_that_leaves_early_is_no_error(asked):
    command = [sys.executable, str(REPOSITORY / "train.py"), *asked]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 0 and not said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.slow
def test_ctrl_c_sigterm_and_a_closed_terminal_save_say_how_to_go_on_and_exit_130(tiny_run, tmp_path, number):
    command = [sys.executable, str(REPOSITORY / "train.py"), *tiny_run, "preset.steps=100000", "folder=a"]
    command += ["callbacks.checkpoint.every_n_train_steps=3"]
    given = dict(cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    default = partial(signal.signal, number, signal.SIG_DFL)  # whoever runs these tests may ignore it
    with subprocess.Popen(command, preexec_fn=default, **given) as process:
        until = time.monotonic() + 90
        while not (tmp_path / "a" / "checkpoints" / "last.ckpt").exists() and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.1)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "resume=auto" in said and "Traceback" not in said
    assert f"interrupted at step {load(tmp_path / 'a')['global_step']}" in said


@pytest.mark.slow
def test_a_sweep_runs_every_job_tells_which_failed_and_skips_what_is_done_the_second_time(
    tiny_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    short = [o for o in tiny_run if not o.startswith(("data.path", "base.name"))]
    paths = [o for o in tiny_run if o.startswith(("data.path", "base.name"))]
    # Long paths do not belong into folder names.
    named = (
        f"hydra.job.config.override_dirname.exclude_keys={[o.partition('=')[0].lstrip('+') for o in tiny_run]}".replace(
            "'", ""
        )
    )
    sweep = ["-m", *short, *paths, named, "seed=0,1"]
    assert run([*sweep, "stage.muon_lr=0.01,-1"]) == 2
    shown = capsys.readouterr().out
    jobs = sorted(p.name for p in (tmp_path / "runs" / "sweep").iterdir() if p.is_dir())
    assert jobs == [f"seed-{s}__stage.muon_lr-{lr}" for s in (0, 1) for lr in ("-1", "0.01")]
    assert shown.count("failed") == 2
    before = load(tmp_path / "runs" / "sweep" / jobs[1])
    assert run([*sweep, "stage.muon_lr=0.01"]) == 0
    assert capsys.readouterr().out.count("done before") == 2
    assert load(tmp_path / "runs" / "sweep" / jobs[1])["global_step"] == before["global_step"]
