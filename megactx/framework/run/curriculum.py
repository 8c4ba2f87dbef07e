"""A curriculum: experiments that run in turn in folders below one run folder, each from the best of the one before."""

import logging
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from ..config.search_path import compose, reference
from ..config.validate import locate, validate
from ..errors import DONE, MISTAKE, composition_message, verdict
from . import distributed
from .fit import build_and_run, check_data, finish_loggers
from .pace import settle
from .resume import begun_with, best, differing, last_of, newest, plain, refuse_other
from .runfolder import close_folder, held, open_folder, short, show

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
    cfg.folder = short(folder / name)
    return cfg


def stages_of(cfg: DictConfig, here, folder: Path, device) -> dict[str, DictConfig]:
    """name -> config of a curriculum's stages; empty for any other run.

    Args:
        here: Hydra's own config of this run.
        folder: of the curriculum.

    Raises:
        ValueError: a mistake in any of them: the last one's is told before the first one runs.
    """
    if cfg.curriculum and device.count > 1:
        raise ValueError(
            f"trainer.devices={cfg.trainer.devices}: a curriculum runs on 1 device; run its stages one by one, each"
            " with stage.init=FOLDER of the one before"
        )
    overrides, known = list(here.overrides.task), reference(here.runtime.choices, cfg)
    stages = {name: stage_config(name, overrides, folder) for name in cfg.curriculum}
    for name, stage in stages.items():
        kind = locate(stage.stage["_target_"])
        if not kind.in_curriculum:
            raise ValueError(f"curriculum: {name} cannot run in one; gist stages can, such as gist_stage1")
        validate(stage, known)
    if len(stages) < len(cfg.curriculum):
        raise ValueError(f"curriculum={list(cfg.curriculum)}: each experiment runs once, in a folder of its name")
    return stages


def run_in_turn(
    stages: dict[str, DictConfig],
    overrides: list[str],
    known: DictConfig,
    folder: Path,
    device,
    kept: list[Path],
    shared: Path | None,
) -> None:
    """A stage that is done is passed by, one that was begun goes on, a new one starts from the best of the last.

    Args:
        overrides: of the command line.
        known: the group choices without the experiment's and the command line's values.
        folder: of the curriculum.
        kept: the run folders so far; each stage's is added.
        shared: the folder of the sweep that this is a job of, if any.

    Raises:
        ValueError: a stage has not the data that it needs; said before any of them trains.
    """
    to_come = {name: stage for name, stage in stages.items() if not (folder / name / "done").exists()}
    for name, stage in to_come.items() if len(to_come) > 1 else ():
        log.info("Checking the data of stage %s", name)
        try:
            check_data(stage)
        except Exception as error:
            code, message = verdict(error)
            if code == MISTAKE:
                raise ValueError(f"curriculum, stage {name}: {message}") from error
            raise
    before = None
    for index, (name, stage) in enumerate(stages.items()):
        own = folder / name
        if before is not None:
            stage.stage.init = short(best(before))
        if not (own / "done").exists():
            with held(own):  # a start of this stage alone, with resume=auto, would go on in it too
                checkpoint = last_of(stage, own)
                print(f"\nStage {index + 1} of {len(stages)}: {name}", flush=True)
                cut = settle(stage, overrides, known, begun_with(checkpoint), device, shared)
                config = plain(stage)
                open_folder(own, config, overrides, device.why)
                kept.append(own)
                show(config, device.why, stage.folder)
                build_and_run(stage, config, own, device, checkpoint)
                print(f"{cut}\n" * bool(cut), end="")
                finish_loggers(DONE)
                close_folder(own)
        else:
            refuse_other(stage, own)  # its experiment may have been edited since
        before = own
    if not distributed.rank():
        locate(stage.stage["_target_"]).conclude(folder, list(stages))


def changed(cfg: DictConfig, overrides: list[str], folder: Path) -> list[str]:
    """``key: then -> now`` of each setting in which a run that is done differs from ``cfg``; of a curriculum, in any
    of its stages."""
    changes = differing(cfg, folder, finished=True)
    for name in cfg.curriculum:
        stage, own = stage_config(name, overrides, folder), folder / name
        if (own / "config.yaml").exists():
            stage.stage.init = OmegaConf.load(own / "config.yaml").stage.init  # it follows from the stage before
            changes += [f"{name}: {line}" for line in differing(stage, own, finished=True)]
    return changes


def find_curriculum(cfg: DictConfig, folder: Path, fixed: bool) -> Path:
    """The folder to go on in, or ``folder`` for a new one.

    Args:
        folder: the folder that this curriculum would have as a new one.
        fixed: it always has this folder (a job of a sweep), so what is there goes on.

    Raises:
        ValueError: what would go on has other settings, ``resume`` is a path, or the folder holds another run.
    """
    there = (folder / "config.yaml").exists()
    if fixed:
        if there:
            refuse_other(cfg, folder)
        return folder
    if cfg.resume == "never" and there:
        raise ValueError(f"folder={folder}: it holds a run; use resume=auto, or another folder")
    if cfg.resume not in ("never", "auto"):
        raise ValueError(f"resume={cfg.resume}: a curriculum goes on with resume=auto, one stage by itself")
    return (newest(cfg, folder, "run.log") if cfg.resume == "auto" else None) or folder
