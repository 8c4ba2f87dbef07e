"""The run folder: what was run, with what, on what; and its log.

``config.yaml`` the resolved config without secrets, ``run.yaml`` command, commit, versions, device, ``run.log`` what
was said, ``error.txt`` the traceback of a failure, ``done`` at the end. Of several processes only the first one writes
and speaks; another one leaves no more than the traceback of a failure of its own.
"""

import contextlib
import logging
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

from omegaconf import OmegaConf

from .. import files
from ..files import IN_RUN, clear, writing
from ..lock import Lock
from .distributed import rank

PACKAGES = ("megactx", "torch", "lightning", "transformers", "tokenizers", "datasets", "torchmetrics", "peft", "numpy")
SECRET = re.compile(r"(key|token|password|secret)$", re.IGNORECASE)
HIDDEN = "(hidden)"
write = partial(files.write, remedy=IN_RUN)
NOISE = (
    r".*does not have many workers.*",
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*exists and is not empty.*",
    r".*resuming from a checkpoint that ended before the epoch.*",  # our loaders are resumable: they count on
    r".*in eval mode at the start of training.*",  # a frozen base is
    r".*The dirpath has changed from.*",
    r".*`lr_scheduler.step\(\)` before `optimizer.step\(\)`.*",
    r".*recommended to use `self.log\(.*sync_dist=True.*",  # what is logged there is of all processes already
)


def hide_secrets(tree):
    """A copy of nested dicts and lists in which the values of ``api_key``, ``hf_token`` and the like are hidden.

    A name counts as a secret when it ends with key, token, password or secret: ``max_tokens`` does not.
    """
    if isinstance(tree, dict):
        return {
            name: HIDDEN
            if SECRET.search(str(name)) and not isinstance(value, dict | list | None)
            else hide_secrets(value)
            for name, value in tree.items()
        }
    return [hide_secrets(value) for value in tree] if isinstance(tree, list) else tree


def hide_in_command(overrides) -> list[str]:
    """Overrides with the values of secrets hidden."""
    pairs = [(override, *override.partition("=")[:2]) for override in overrides]
    return [f"{name}={HIDDEN}" if equals and SECRET.search(name) else override for override, name, equals in pairs]


def short(folder: Path) -> str:
    """Relative to the working directory where it is below it."""
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)


def open_folder(folder: Path, config: dict, overrides: list[str], why: str) -> None:
    """Create the run folder with the record of the run.

    Args:
        config: the resolved config, without secrets.
        why: device and precision.
    """
    if rank():
        return
    with writing(folder / "config.yaml", "set folder=... to another place"):
        folder.mkdir(parents=True, exist_ok=True)
    clear(folder)
    write(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
    record = {
        "command": ["python", "train.py", *hide_in_command(overrides)],
        "choices": _choices(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": why,
        "git": git_commit(),
        "python": platform.python_version(),
        "packages": versions(),
    }
    write(folder / "run.yaml", OmegaConf.to_yaml(OmegaConf.create(record)))
    for stale in ("error.txt", "done"):
        (folder / stale).unlink(missing_ok=True)


def _choices() -> dict[str, str]:
    """Group -> option of the run that Hydra runs now."""
    from hydra.core.hydra_config import HydraConfig

    found = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return {group: option for group, option in found.items() if option is not None and "hydra/" not in group}


def held(folder: Path) -> contextlib.AbstractContextManager:
    """Holds a run folder: a second ``resume=auto`` would go on in it at the same time.

    Raises:
        ValueError: another process trains in it.
    """
    if rank():
        return contextlib.nullcontext()
    busy = f"folder={folder}: another process ({{holder}}) trains in it; wait for it to end, or start another run with"
    return Lock(folder / ".lock", f"{busy} resume=never and another folder", "set folder=... to another place")


def close_folder(folder: Path) -> None:
    """Mark the run as finished: ``resume=auto`` and sweeps pass it by."""
    if not rank():
        write(folder / "done", time.strftime("%Y-%m-%d %H:%M:%S\n"))


def write_error(folder: Path | None) -> str:
    """Keep the traceback of the error at hand; -> a hint where it is."""
    if folder is None or not folder.is_dir():
        return ""
    path = folder / (f"error_{rank()}.txt" if rank() else "error.txt")
    try:
        write(path, traceback.format_exc())
    except OSError:  # the disk may be what failed
        return ""
    return f"\nThe traceback is in {path}"


def git_commit() -> str | None:
    """Commit of the checkout that the package runs from, with ``+changes`` where the tree differs from it."""
    here = Path(__file__).resolve().parents[3]
    if not (here / ".git").exists():
        return None
    how = {"text": True, "timeout": 10, "stderr": subprocess.DEVNULL}
    asked = ("rev-parse HEAD", "status --porcelain")
    try:
        commit, status = (subprocess.check_output(["git", "-C", here, *words.split()], **how) for words in asked)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+changes" if status.strip() else "")


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def show(config: dict, why: str, folder: Path) -> None:
    """Print the resolved config once, with the device and why."""
    if rank():
        return
    from rich.console import Console
    from rich.syntax import Syntax

    text = OmegaConf.to_yaml(OmegaConf.create(config)).rstrip()
    if sys.stdout.isatty():
        Console().print(Syntax(text, "yaml", background_color="default"))
    else:
        print(text)
    print(f"\nDevice  {why}\nFolder  {folder}\n", flush=True)


def quiet_bars() -> None:
    """Without a terminal the bars of datasets and transformers are silent. Before they are imported."""
    if not sys.stdout.isatty():
        for library in ("DATASETS", "HUB"):
            os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")


@contextlib.contextmanager
def quiet():
    """Libraries speak from warnings on, and known noise is left out."""
    import warnings

    for name in ("lightning.pytorch", "lightning.fabric", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for pattern in NOISE:
            warnings.filterwarnings("ignore", pattern)
        yield


@contextlib.contextmanager
def logs(folder: Path | None):
    """Our own messages go to stdout and ``run.log``, those of libraries too, as far as ``quiet`` lets them."""
    root = logging.getLogger()
    level = root.level
    to_file = logging.FileHandler(os.devnull if rank() or folder is None else folder / "run.log", encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_screen = logging.StreamHandler(sys.stdout)
    to_screen.addFilter(lambda record: record.name.startswith("megactx") or record.levelno >= logging.WARNING)
    handlers = (to_file, to_screen)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        with quiet():
            yield
    finally:
        root.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
