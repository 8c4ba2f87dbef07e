"""A curriculum: experiments that run in turn in folders below one run folder, each from the best of the one before."""

import logging
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from .errors import composition_message
from .resume import differing
from .search_path import compose

log = logging.getLogger(__name__)

# Of the command line these are about the curriculum as a whole.
OWN = ("experiment", "curriculum", "resume", "folder", "name")


def stage_config(name: str, overrides: list[str], folder: Path) -> DictConfig:
    """The config of one stage: its experiment with what the command line set for all of them.

    Args:
        folder: of the curriculum.

    Raises:
        ValueError: there is no such experiment, or a setting does not exist in it.
    """
    kept = [override for override in overrides if override.lstrip("+").partition("=")[0] not in OWN]
    try:
        cfg = compose([f"experiment={name}", *kept])
    except HydraException as error:
        raise ValueError(f"curriculum: {composition_message(error, kept)}") from error
    OmegaConf.set_struct(cfg, False)
    own = folder / name
    cfg.folder = str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else str(own)
    return cfg


def find_curriculum(cfg: DictConfig, folder: Path, fixed: bool) -> Path:
    """The folder to go on in, or ``folder`` for a new one.

    Args:
        folder: the folder that this curriculum would have as a new one.
        fixed: it always has this folder (a job of a sweep), so what is there goes on.

    Raises:
        ValueError: what would go on has other settings, ``resume`` is a path, or the folder holds another run.
    """
    if fixed:
        return _checked(cfg, folder) if (folder / "config.yaml").exists() else folder
    if cfg.resume == "never":
        if (folder / "config.yaml").exists():
            raise ValueError(f"folder={folder}: it holds a run; use resume=auto, or another folder")
        return folder
    if cfg.resume != "auto":
        raise ValueError(
            f"resume={cfg.resume}: a curriculum goes on with resume=auto; one stage goes on from a checkpoint with"
            " experiment=STAGE resume=PATH, or starts from its weights with stage.init=PATH"
        )
    begun = [path.parent for path in folder.parent.glob("*/config.yaml") if not (path.parent / "done").exists()]
    begun.sort(key=lambda run: (run / "run.log").stat().st_mtime if (run / "run.log").exists() else 0, reverse=True)
    if not begun:
        log.info("resume=auto: no unfinished run in %s; starting fresh", folder.parent)
        return folder
    return next((run for run in begun if not differing(cfg, run)), None) or _checked(cfg, begun[0])


def _checked(cfg: DictConfig, run: Path) -> Path:
    if changes := differing(cfg, run):
        raise ValueError(
            f"the unfinished run {run} has other settings: {'; '.join(changes)}. Set them alike, or use resume=never"
        )
    return run
