"""Sweeps (``-m``) that go on where they stopped and hide no failure.

Every job has a fixed folder, named by its overrides, with an ``outcome.json``. A second start skips what is done and
resumes the rest; at the end all jobs stand in one table, and those with a result in a leaderboard. Outcomes come from
files, so that jobs may run in other processes.
"""

import importlib
import json
import os
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import open_dict, read_write

from ..errors import DONE, FAILED
from ..lock import Lock
from ..run.runfolder import hide_in_command, write

_ID = "MEGACTX_SWEEP"  # reaches the jobs of launchers that start processes
_THREADS = "OMP_NUM_THREADS"
WIDTH = 120  # columns, where the output is no terminal


@dataclass
class _Sweep:
    folder: Path
    report: str
    threads: str | None  # what OMP_NUM_THREADS was before


_now: _Sweep | None = None  # the sweep that this process started, until its summary


class RememberFolder(Callback):
    """Notes the folder of the sweep that starts, and shares the cores between jobs that run at once.

    Args:
        report: a function by its dotted name: (folders of the jobs, folder of the sweep) -> what is shown at the end.
            It comes from the config because this room may not import the one that has it.
    """

    def __init__(self, report: str):
        self.report = report

    def on_multirun_start(self, config, **kwargs) -> None:
        global _now
        _now = _Sweep(Path(config.hydra.sweep.dir), self.report, os.environ.get(_THREADS))
        os.environ[_ID] = uuid.uuid4().hex
        _share_cores(config)

    def on_multirun_end(self, config, **kwargs) -> None:
        # Hydra keeps the overrides there as they were given, secrets included.
        (Path(config.hydra.sweep.dir) / "multirun.yaml").unlink(missing_ok=True)


def _share_cores(config) -> None:
    """Two OpenMP programs on the same cores slow each other down twentyfold: jobs at once x threads <= cores."""
    launcher = str(config.hydra.launcher._target_)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if "Joblib" in launcher:
        at_once = config.hydra.launcher.n_jobs
        at_once = max(1, cores + 1 + at_once) if at_once < 0 else at_once
    elif "submitit" in launcher and "Local" in launcher:
        if config.hydra.sweeper.get("max_batch_size", 0) is None:  # it starts the jobs of a batch all at once
            with read_write(config), open_dict(config):
                config.hydra.sweeper.max_batch_size = cores
        at_once = config.hydra.sweeper.get("max_batch_size") or config.hydra.sweeper.get("n_jobs", 1)
    elif "submitit" not in launcher:
        return
    if "submitit" in launcher:
        print(f"What the jobs say is in {config.hydra.launcher.submitit_folder.replace('%j', '*')}", flush=True)
    if "Slurm" in launcher:
        return  # each job has cores of its own
    os.environ.setdefault(_THREADS, str(max(1, cores // at_once)))


def alone(folder: Path) -> Lock:
    """Holds the folder of a job: jobs of a launcher may outlive a sweep that was killed and then started again."""
    return Lock(folder / ".lock", f"another process is at {folder}; waiting for it", wait=True)


def note(folder: Path, state: str, code: int | None = None, message: str = "", value: float | None = None) -> None:
    """Write the outcome of a job, or that it has started (``code`` None).

    Args:
        value: what a sweeper may optimise, lower is better.
    """
    overrides = list(HydraConfig.get().overrides.task)
    outcome = dict(sweep=os.environ.get(_ID), overrides=hide_in_command(overrides), state=state, code=code)
    write(folder / "outcome.json", json.dumps(outcome | dict(message=message, value=value), indent=1))


def value_before(folder: Path) -> float | None:
    """The value that a job which is done had."""
    path = folder / "outcome.json"
    return json.loads(path.read_text()).get("value") if path.exists() else None


def begun() -> bool:
    """Whether a sweep was begun that has no summary yet."""
    return _now is not None


def jobs_begun() -> bool:
    """Whether any job of that sweep was begun."""
    return _now is not None and bool(_outcomes(_now.folder))


def _outcomes(folder: Path) -> list[tuple[Path, dict]]:
    """Job folders and outcomes of this start of the sweep; the folder may hold others of earlier ones."""
    found = [(path.parent, json.loads(path.read_text())) for path in sorted(folder.glob("*/outcome.json"))]
    return [(job, outcome) for job, outcome in found if outcome["sweep"] == os.environ.get(_ID)]


def summary() -> int:
    """Print the table of the jobs of the sweep that has just ended, and its leaderboard.

    Returns:
        0, or the code of the first job that is not done; 0 where there was no sweep since the last summary.
    """
    global _now
    if _now is None:
        return DONE
    sweep, _now = _now, None
    if sweep.threads is None:
        os.environ.pop(_THREADS, None)
    found = _outcomes(sweep.folder)
    del os.environ[_ID]
    code = DONE
    for _, outcome in found:
        if outcome["code"] != DONE:
            code = code or outcome["code"] or FAILED
    if found:
        _show(sweep.folder, [outcome for _, outcome in found])
        module, _, name = sweep.report.rpartition(".")
        try:
            getattr(importlib.import_module(module), name)([folder for folder, _ in found], sweep.folder)
        except Exception as error:  # a table that cannot be made must not hide how the jobs ended
            print(f"megactx: no leaderboard: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            code = code or FAILED
    return code


def _show(folder: Path, outcomes: list[dict]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    table = Table(title=f"Sweep in {folder}", title_justify="left")
    for name in ("job", "state", "code", "message"):
        table.add_column(name, no_wrap=name in ("state", "code"))
    shared = set.intersection(*[set(outcome["overrides"]) for outcome in outcomes]) if len(outcomes) > 1 else set()
    for outcome in outcomes:
        job = " ".join(override for override in outcome["overrides"] if override not in shared)
        first = (outcome["message"] or "").splitlines()
        state = "ended without a word" if outcome["state"] == "running" else outcome["state"]
        table.add_row(escape(job), state, str(outcome["code"]), escape(first[0]) if first else "")
    console.print(table)
