"""A curriculum: experiments that run in turn in folders below one run folder, with what those before have made.

A stage declares what it ``gives``, a name and the place in its run folder, and what it ``takes``, a name and the
setting that it is for: a tokenizer, a base LM, a GistNet, a LensNet. The newest of a name counts.
"""

import contextlib
import logging
import time
from pathlib import Path

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ..config.search_path import compose, reference
from ..config.validate import locate, validate
from ..errors import DONE, MISTAKE, composition_message, verdict
from . import distributed
from .fit import build_and_run, check_data, finish_loggers, other_content
from .pace import settle
from .resume import begun_with, best, differing, last_of, newest, plain, refuse_other
from .runfolder import close_folder, held, open_folder, short, show, write

log = logging.getLogger(__name__)

# Of the command line these are about the curriculum as a whole.
OWN = ("experiment", "curriculum", "resume", "folder", "name")


def stage_config(name: str, overrides: list[str], folder: Path) -> tuple[DictConfig, DictConfig]:
    """The config of one stage: its experiment with what the command line set for all of them; and its group choices
    without either's values.

    Args:
        folder: of the curriculum.

    Raises:
        ValueError: there is no such experiment, or a setting does not exist in it.
    """
    kept = [override for override in overrides if override.lstrip("+").partition("=")[0] not in OWN]
    try:
        cfg = compose([f"experiment={name}", *kept], with_hydra=True)
    except HydraException as error:
        raise ValueError(f"curriculum: {composition_message(error, kept)}") from error
    OmegaConf.set_struct(cfg, False)
    choices = cfg.pop("hydra").runtime.choices
    cfg.folder = short(folder / name)
    return cfg, reference(choices, cfg)


def hand_over(cfg: DictConfig, given: dict[str, Path]) -> list[str]:
    """Set what a stage takes of the stages before it; -> the settings.

    Args:
        given: name -> where it is. Of a run folder it is the best checkpoint, as soon as there is one.
    """
    taken = {key: given[name] for name, key in locate(cfg.stage["_target_"]).takes.items() if name in given}
    for key, path in taken.items():
        trained = (path / "checkpoints").is_dir() and any((path / "checkpoints").glob("*.ckpt"))
        OmegaConf.update(cfg, key, short(best(path) if trained else path))
    return [*taken]


def gives(cfg: DictConfig, own: Path) -> dict[str, Path]:
    """What a stage with this run folder hands over: name -> where it is."""
    return {name: own / place for name, place in locate(cfg.stage["_target_"]).gives.items()}


def stages_of(cfg: DictConfig, here, folder: Path, device) -> dict[str, tuple[DictConfig, DictConfig]]:
    """name -> config of a curriculum's stages, and what ``stage_config`` gives beside it; empty for any other run.

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
    overrides, given = list(here.overrides.task), {}
    stages = {name: stage_config(name, overrides, folder) for name in cfg.curriculum}
    if len(stages) < len(cfg.curriculum):
        raise ValueError(f"curriculum={list(cfg.curriculum)}: each experiment runs once, in a folder of its name")
    if cfg.megacontext == "none":  # the same base, answers and data, and nothing that makes or reads gists
        stages = {name: pair for name, pair in stages.items() if locate(pair[0].stage["_target_"]).stock}
        if cfg.curriculum and not stages:
            raise ValueError(
                f"megacontext=none leaves out every stage of curriculum={list(cfg.curriculum)}: it needs one that"
                " trains a tokenizer or a base LM"
            )
    for name, (stage, known) in stages.items():
        if not hand_over(stage, given) and given:
            wants = ", ".join(locate(stage.stage["_target_"]).takes) or "nothing"
            raise ValueError(f"curriculum: {name} takes {wants}, and those before it give {', '.join(given)}")
        validate(stage, known)
        given |= gives(stage, folder / name)
    return stages


def run_in_turn(
    stages: dict[str, tuple[DictConfig, DictConfig]],
    overrides: list[str],
    folder: Path,
    device,
    kept: list[Path],
    shared: Path | None,
) -> None:
    """A stage that is done is passed by, one that was begun goes on, a new one starts from what those before gave.

    Args:
        stages: of ``stages_of``.
        overrides: of the command line.
        folder: of the curriculum.
        kept: the run folders so far; each stage's is added.
        shared: the folder of the sweep that this is a job of, if any.

    Raises:
        ValueError: a stage has not the data that it needs; said before any of them trains.
    """
    to_come = {name: stage for name, (stage, _) in stages.items() if not (folder / name / "done").exists()}
    for name, stage in to_come.items() if len(to_come) > 1 else ():
        log.info("Checking the data of stage %s", name)
        try:
            check_data(stage, whole=_is_there(stage, folder))
        except Exception as error:
            code, message = verdict(error)
            if code == MISTAKE:
                raise ValueError(f"curriculum, stage {name}: {message}") from error
            raise
    given: dict[str, Path] = {}
    for index, (name, (stage, known)) in enumerate(stages.items()):
        own = folder / name
        hand_over(stage, given)
        if not (own / "done").exists():
            with held(own):  # a start of this stage alone, with resume=auto, would go on in it too
                checkpoint = last_of(stage, own)
                print(f"\nStage {index + 1} of {len(stages)}: {name}", flush=True)
                cut = settle(stage, overrides, known, begun_with(checkpoint), device, shared)
                config = plain(stage)
                open_folder(own, config, overrides, device.why)
                kept.append(own)
                show(config, device.why, stage.folder)
                with timed(own):
                    build_and_run(stage, config, own, device, checkpoint)
                if cut:
                    print(cut)
                finish_loggers(DONE)
                close_folder(own)
        else:
            refuse_other(stage, own)  # its experiment may have been edited since, and what it was made of
            if changes := other_content(stage, own):
                raise ValueError(f"{own} was done with other content: {'; '.join(changes)}. Remove it to run it again")
        given |= gives(stage, own)
    if not distributed.rank():
        locate(stage.stage["_target_"]).conclude(folder, list(stages))
        _keep(stage.logger, folder)


def _keep(loggers: DictConfig, folder: Path) -> None:
    """What was concluded goes where the stages have logged, as a run beside theirs."""
    for node in loggers.values():
        if node and hasattr(locate(node["_target_"]), "keep"):
            instantiate(node, folder=str(folder)).keep(folder)
            finish_loggers(DONE)


def _is_there(cfg: DictConfig, folder: Path) -> bool:
    """Whether all is there that a stage and its data are built from; weights to start from are read later."""
    keys = set(locate(cfg.stage["_target_"]).takes.values()) - {"stage.init"}
    paths = [OmegaConf.select(cfg, key) for key in keys]
    own = [Path(path) for path in paths if path and Path(path).absolute().is_relative_to(folder.absolute())]
    return all(path.exists() for path in own)


@contextlib.contextmanager
def timed(own: Path):
    """Adds up in ``seconds.txt`` how long a stage took; of an attempt that was killed nothing is known."""
    path, began = own / "seconds.txt", time.monotonic()
    before = float(path.read_text()) if path.exists() else 0.0
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the disk may be what failed
            write(path, f"{before + time.monotonic() - began:.1f}\n")


def changed(cfg: DictConfig, overrides: list[str], folder: Path) -> list[str]:
    """What makes the result of a run that is done another one than that of ``cfg``: ``key: then -> now`` of each
    setting that differs, and texts or a base LM that were changed; of a curriculum, in any of its stages."""
    changes = differing(cfg, folder, finished=True) + other_content(cfg, folder)
    for name in cfg.curriculum:
        (stage, _), own = stage_config(name, overrides, folder), folder / name
        if (own / "config.yaml").exists():
            before = OmegaConf.load(own / "config.yaml")
            for key in locate(stage.stage["_target_"]).takes.values():  # they follow from the stages before
                if (value := OmegaConf.select(before, key)) is not None:
                    OmegaConf.update(stage, key, value)
            lines = differing(stage, own, finished=True) + other_content(stage, own)
            changes += [f"{name}: {line}" for line in lines]
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
