"""Two hosts, made of network namespaces and a cable between them: they train as one process does."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from megactx.framework.app import run
from megactx.framework.errors import FAILED, verdict

REPOSITORY, SGD = Path(__file__).parents[2], Path(__file__).with_name("plain_sgd.py")
TORCHRUN = Path(sys.executable).with_name("torchrun")
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=2"]


def ip(*arguments: str) -> int:
    return subprocess.run(["ip", *arguments], capture_output=True).returncode


@pytest.fixture(scope="module")
def hosts():
    """Names of two namespaces; host n has the address 10.91.7.n + 1 on a device of its own name."""
    names = [f"mx{os.getpid()}h{n}" for n in range(2)]
    if not shutil.which("ip") or any(ip("netns", "add", name) for name in names):
        pytest.skip("needs ip and the right to make network namespaces")
    try:
        a, b = ("cable0", "cable1")
        assert not ip("link", "add", a, "netns", names[0], "type", "veth", "peer", "name", b, "netns", names[1])
        for number, (name, device) in enumerate(zip(names, (a, b), strict=True)):
            assert not ip("-n", name, "addr", "add", f"10.91.7.{number + 1}/24", "dev", device)
            assert not ip("-n", name, "link", "set", "lo", "up") and not ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def torchrun(number: int) -> tuple[list, dict]:
    """How torchrun is started on a host."""
    place = ["--node-rank", str(number), "--master-addr", "10.91.7.1", "--master-port", "29517"]
    return [TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", *place], {}


def srun(number: int) -> tuple[list, dict]:
    """What srun starts on a host: the program itself, and where it is in the environment."""
    told = {"JOB_ID": "4711", "JOB_NAME": "train", "NNODES": "2", "NTASKS": "2", "NTASKS_PER_NODE": "1"}
    told |= {"NODELIST": "10.91.7.[1-2]", "JOB_NODELIST": "10.91.7.[1-2]"}
    told |= {"NODEID": str(number), "PROCID": str(number), "LOCALID": "0"}
    return [sys.executable], {f"SLURM_{name}": value for name, value in told.items()}


class Started:
    """One program on both hosts, each with a cache of its own."""

    def __init__(self, hosts, logs: Path, program: Path, *arguments: str, by=torchrun):
        self.hosts, self.logs, self.running = hosts, [logs / f"host{n}.log" for n in range(2)], []
        for number, (host, log) in enumerate(zip(hosts, self.logs, strict=True)):
            start, told = by(number)
            environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "GLOO_SOCKET_IFNAME": f"cable{number}", **told}
            environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            environment |= {"MEGACTX_CACHE": str(logs / f"cache{number}")}
            command = ["ip", "netns", "exec", host, *start, program, *arguments]
            with log.open("w") as file:
                shared = {"env": environment, "stdout": file, "stderr": subprocess.STDOUT}
                self.running.append(subprocess.Popen(list(map(str, command)), **shared))

    def done(self) -> list[int]:
        """Exit codes; whatever hangs is ended after ten minutes."""
        try:
            return [process.wait(timeout=600) for process in self.running]
        finally:
            for host in self.hosts:
                kill(host)

    def said(self, number: int) -> str:
        return self.logs[number].read_text()


def kill(host: str) -> None:
    """A host that loses its power."""
    found = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout
    for pid in map(int, found.split()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def settings(gist_settings):
    kept = [setting for setting in gist_settings if setting != "trainer=cpu"]
    preset = [f"preset.{setting}" for setting in ("batch=1", "steps=3", "validate_every=1", "validation_documents=5")]
    short = ["horizon.tokens=16", "stage.evaluate.blocks=8", "stage.evaluate.controls=false", "stage.evaluate.copies=0"]
    return [*kept, *preset, *short, "stage.prefills.gigabytes=1"]


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    """A run of one process with its cache."""
    folder = tmp_path_factory.mktemp("one")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "MEGACTX_CACHE": str(folder / "cache")}
    command = [sys.executable, SGD, *settings, "trainer=cpu", "preset.accumulate=2", f"folder={folder / 'run'}"]
    ended = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return folder


def prefills(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (cache / "prefills").rglob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "by"), [("ddp", torchrun), ("fsdp", srun)], ids=["ddp-torchrun", "fsdp-srun"])
def test_two_hosts_have_the_gradients_and_the_validation_of_one_process(hosts, settings, alone, tmp_path, trainer, by):
    one, two = alone / "run", tmp_path / "two" / "run"
    given = [*settings, *TWO, f"trainer={trainer}", "preset.accumulate=1", f"folder={two}"]
    started = Started(hosts, tmp_path, SGD, *given, by=by)
    assert started.done() == [0, 0], started.said(0)
    mine, theirs = (torch.load(folder / "seen.pt", weights_only=True) for folder in (two, one))
    for found, wanted in zip(mine["gradients"], theirs["gradients"], strict=True):
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-6 * gradient.abs().max().item())
    validated = [read(folder) for folder in (two, one)]
    assert len(validated[0]) == 3
    for found, wanted in zip(*validated, strict=True):
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert started.said(0).count("Everything is in") == 1 and "Everything is in" not in started.said(1)
    assert [path.name for path in two.parent.iterdir()] == ["run"], "the other host made no folder of its own"
    # The hosts take the batches of one process in turn, and each keeps the prefills of its own.
    (all_of_them,), both = ([*map(served, sorted(folder.glob("batches-*.txt")))] for folder in (one, two))
    assert both == [all_of_them[0::2], all_of_them[1::2]] and len({*all_of_them}) == len(all_of_them) == 6
    kept = [prefills(tmp_path / f"cache{number}") for number in range(2)]
    assert all(kept) and kept[0] | kept[1] == prefills(alone / "cache")


def served(path: Path) -> list[str]:
    return path.read_text().split()


@pytest.mark.slow  # though it takes longer than others: it is what hosts are for
def test_where_a_host_is_killed_the_other_says_so_and_both_go_on_to_the_same_weights(hosts, settings, tmp_path):
    train = [REPOSITORY / "train.py", *settings, *TWO, "gistnet.dropout=0.2", "preset.steps=8", "preset.accumulate=1"]
    straight, broken = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert Started(hosts, tmp_path, *train, f"folder={straight}").done() == [0, 0]
    started = Started(hosts, tmp_path, *train, f"folder={broken}")
    until = time.monotonic() + 300
    while not (broken / "checkpoints" / "last.ckpt").exists() and time.monotonic() < until:
        time.sleep(0.05)
    kill(hosts[1])
    codes = started.done()
    assert codes[0] != 0 and started.said(0).count("another process of this run has gone") == 1, started.said(0)
    assert not (broken / "done").exists()
    again = Started(hosts, tmp_path, *train, f"folder={broken}", "resume=auto")
    assert again.done() == [0, 0] and "Going on from" in again.said(0), again.said(0)
    mine, theirs = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (broken, straight)
    )
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def read(folder: Path) -> list[dict]:
    """Rows of the log with a validation, as numbers, without what a clock said."""
    import csv

    with (folder / "metrics.csv").open(newline="") as file:
        rows = [
            {k: float(v) for k, v in row.items() if v and not k.startswith("speed/")} for row in csv.DictReader(file)
        ]
    return [row for row in rows if "val/dnll" in row]


def test_several_hosts_need_a_folder_that_all_of_them_see(gist_settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kept = [setting for setting in gist_settings if setting != "trainer=cpu"]
    assert run([*kept, *TWO]) == 2
    assert "trainer.num_nodes=2: set folder=... to the same place on every host" in capsys.readouterr().err
    assert run(["-m", *kept, *TWO, "hydra.job.config.override_dirname.exclude_keys=[data.path]", "seed=0"]) == 2
    said = capsys.readouterr()
    assert "not with -m" in said.err + said.out


def test_a_sweep_over_a_slurm_queue_asks_for_what_its_settings_say_and_queues_again(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit", reason="submitit is not installed (the extra sweep)")
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    settings = OmegaConf.load(REPOSITORY / "configs" / "hydra" / "launcher" / "submitit_slurm.yaml")
    settings = OmegaConf.merge(settings, {"partition": "cards", "submitit_folder": str(tmp_path), "name": "sweep"})
    assert settings.pop("_target_").endswith("SlurmLauncher")
    given = OmegaConf.to_container(settings)
    shared = {"name", "timeout_min", "nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "mem_gb"}
    shared |= {"stderr_to_stdout"}
    executor = submitit.AutoExecutor(
        given.pop("submitit_folder"), "slurm", slurm_max_num_timeout=given.pop("max_num_timeout")
    )
    executor.update_parameters(**{key if key in shared else f"slurm_{key}": value for key, value in given.items()})
    text = executor._executor._make_submission_file_text("run", "1")
    for line in ("partition=cards", "time=1440", "nodes=1", "gpus-per-node=1", "cpus-per-task=8", "mem=64GB"):
        assert f"#SBATCH --{line}" in text, text
    assert "#SBATCH --signal=USR2@300" in text and "account" not in text
    assert executor._executor.max_num_timeout == 30


@pytest.mark.parametrize("error", [RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: reset\nmore"), "Store"])
def test_a_process_that_has_gone_is_told_as_a_failed_run_and_how_to_go_on(error):
    error = torch.distributed.DistStoreError("wait timeout") if error == "Store" else error
    code, told = verdict(error)
    assert code == FAILED and "another process of this run has gone" in told and "resume=auto" in told
    assert "\n" not in told
