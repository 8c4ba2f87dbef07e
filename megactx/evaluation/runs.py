"""Run folders as a comparison sees them: what each run was set to, what it reached, or why it reached nothing."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

NOT_SETTINGS = ("resume", "name", "folder", "logger", "callbacks", "curriculum", "trainer.default_root_dir")
TAKEN_OVER = ("stage", "datamodule", "trainer")  # groups whose values mostly repeat another group's
WITHOUT_BACKBONE = ("pooling", "layers", "num_heads", "dropout")  # they say nothing where gistnet.type=mean
ERROR = re.compile(r"^[A-Za-z_][\w.]*: .*$", re.MULTILINE)  # the last line of a traceback


@dataclass
class Run:
    """One run folder. ``report``: of its ``report.json``; ``None`` where there is no result, with the reason."""

    folder: Path
    config: dict
    report: dict | None = None
    reason: str = ""
    settings: dict = field(default_factory=dict)  # dotted key -> value, without the seed
    steps: int = 0  # taken
    parameters: int | None = None  # of the GistNet; None where no checkpoint is left to count them in

    @property
    def seed(self):
        return self.config.get("seed")

    @property
    def training_tokens(self) -> int:
        """Predictions that the loss was taken over: steps x accumulate x batch x spans x H x devices."""
        preset, trainer = self.config["preset"], self.config["trainer"]
        devices = trainer.get("devices", 1)
        devices = devices if isinstance(devices, int) and devices > 0 else 1
        blocks = preset["accumulate"] * preset["batch"] * preset["spans"] * devices * trainer.get("num_nodes", 1)
        return self.steps * blocks * self.report["horizon"]


def find_runs(folders) -> list[Run]:
    """Every run at or below the folders, in the order of their paths.

    Raises:
        ValueError: a folder does not exist, or there is no run in any of them.
    """
    found = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"{folder}: there is no such folder")
        # A job that was refused has an outcome alone. Loggers keep a config.yaml of their own, so that is no sign.
        for name in ("run.yaml", "outcome.json"):
            found |= {path.parent.resolve(): path.parent for path in folder.rglob(name)}
    if not found:
        raise ValueError(f"{', '.join(map(str, folders))}: there is no run in it")
    runs = [read_run(found[path]) for path in sorted(found)]
    return [run for run in runs if not (run.config.get("curriculum") and not run.reason)]  # its stages are runs


def read_run(folder: Path) -> Run:
    """One run folder; never raises for what a run that failed left behind."""
    config = folder / "config.yaml"
    run = Run(folder, yaml.safe_load(config.read_text()) if config.exists() else {})
    run.settings = _settings(run.config)
    if not (folder / "done").exists():
        run.reason = _why_not_done(folder)
    elif run.config.get("curriculum"):
        return run
    elif (path := folder / "report.json").exists() and "subject" in (report := json.loads(path.read_text())):
        run.report = report
        run.steps, run.parameters = _from_checkpoint(folder / "checkpoints" / "last.ckpt", run)
    else:
        run.reason = "its stage writes no report of gists"
    return run


def _why_not_done(folder: Path) -> str:
    outcome, error = folder / "outcome.json", folder / "error.txt"
    if outcome.exists():
        told = json.loads(outcome.read_text())
        state = "not finished: it runs, or was killed" if told["state"] == "running" else told["state"]
        return f"{state}: {told['message'].splitlines()[0]}" if told.get("message") else state
    if error.exists():
        raised = ERROR.search(error.read_text())  # the first of a chain: what came first
        return f"failed: {raised[0]}" if raised else "failed"
    return "not finished: it runs, or was stopped"


def _from_checkpoint(path: Path, run: Run) -> tuple[int, int | None]:
    """Steps taken and parameters of the GistNet; without a checkpoint the steps that were asked for."""
    if not path.exists():
        return run.config["preset"]["steps"], None
    import torch

    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    own = f"nets.{run.report['subject']}."
    sizes = [value.numel() for name, value in checkpoint["state_dict"].items() if name.startswith(own)]
    return checkpoint["global_step"], sum(sizes) or None


def _settings(config: dict) -> dict:
    flat = {}
    for name in sorted(config, key=lambda name: name in TAKEN_OVER):  # a stable sort: what is taken over comes last
        if name not in NOT_SETTINGS:
            _flatten(config[name], name, flat)
    return {
        key: value
        for key, value in flat.items()
        if key not in NOT_SETTINGS and not (key.rpartition(".")[2] == "seed" and value == config.get("seed"))
    }


def _flatten(value, key: str, flat: dict) -> None:
    if isinstance(value, dict) and value:
        skipped = WITHOUT_BACKBONE if value.get("type") == "mean" else ()
        for name, inner in value.items():
            if name not in skipped:
                _flatten(inner, f"{key}.{name}", flat)
    else:
        flat[key] = value


def same_but_seed(runs: list[Run]) -> list[list[Run]]:
    """Runs grouped by their settings, the seed apart; the order of first appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.settings, sort_keys=True, default=str), []).append(run)
    return list(groups.values())


def labels(runs: list[Run]) -> tuple[list[dict], list[str]]:
    """For each run the settings in which the runs differ; and lines that name those that only go along with another.

    Of settings that split the runs into the same groups one is shown, unless each run has a value of its own; of copies
    of a setting, one. What a run does not have is left out of its own. The keys are short: without ``gistnet.`` and
    ``stage.``.
    """
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    shown: list[str] = []
    first_of: dict[tuple, str] = {}  # how a setting splits the runs -> the first such setting
    seen: list[list] = []  # values of settings, run by run
    along: dict[str, list[str]] = {}
    for key in keys:
        own = [json.dumps(run.settings[key], default=str) if key in run.settings else None for run in runs]
        split = tuple(own.index(value) for value in own)
        if not any(split) or own in seen:
            continue
        seen.append(own)
        first = first_of.setdefault(split, key)
        if first == key or (len({*split}) == len(runs) and None not in own):
            shown.append(key)
        elif len({*own} - {None}) > 1:
            along.setdefault(first, []).append(key)
    out = [{short(key): run.settings[key] for key in shown if key in run.settings} for run in runs]
    return out, [f"{short(key)} goes along with {', '.join(map(short, others))}" for key, others in along.items()]


def short(key: str) -> str:
    """A setting's name as a table shows it."""
    return key.removeprefix("stage.").removeprefix("gistnet.")


def in_words(label: dict) -> str:
    """``{"head": "mlp", "layers": 2}`` -> ``head=mlp layers=2``."""

    def word(value) -> str:
        return "null" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    return " ".join(f"{key}={word(value)}" for key, value in label.items())
