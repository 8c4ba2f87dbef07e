"""Where a run goes on: ``resume=never | auto | PATH``. Never a silent fresh start, never another run's weights.

``auto`` goes on in the folder of the newest unfinished run of the same settings, or in ``folder=`` where that is given.
``PATH`` (a checkpoint, or a run folder, of which the last one counts) starts a new folder from there. Checkpoints are
read with ``weights_only``.
"""

import logging
import pickle
import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from .runfolder import hide_secrets

log = logging.getLogger(__name__)

LAST = "checkpoints/last.ckpt"  # in a run folder
# A run may be lengthened: these, and whatever is derived from them, may differ.
LENGTH = ("preset.steps", "preset.minutes", "trainer.max_steps", "trainer.max_time", "trainer.max_epochs")
PACED = ("preset.warmup", "preset.validate_every", "preset.plateau_window", "datamodule.phases")
WATCHERS = ("progress", "summary", "learning_rate", "grad_norm", "speed", "device")  # callbacks that change nothing
# Settings of a stage that no tensor depends on, by the ends of their names or by what they belong to.
WEIGHTLESS = re.compile(
    r"(dropout|dtype|lr|eps|theta|decay|warmup|steps|horizon|objective|weight|folder|init|position|context|num_heads"
    r"|input_layer|_token_id|hidden_act|initializer_range)$"
    r"|^stage\.(evaluate|targets|allocator|budgets|windows|history|contrastive|card|weights|ladder)\b"
)
HOUSE = re.compile(r"^megactx\.framework\..*\.")  # a run may have been begun when a class had its place elsewhere
FREE = ("resume", "logger", "name", "folder", *(f"callbacks.{name}" for name in WATCHERS))


def plain(cfg: DictConfig) -> dict:
    """The resolved config as plain dicts and lists, secrets hidden."""
    return hide_secrets(OmegaConf.to_container(cfg, resolve=True))


def find(cfg: DictConfig, folder: Path, named: bool = False) -> tuple[Path | None, Path]:
    """The checkpoint to go on from, if any, and the folder to write to.

    Args:
        folder: the folder that this run would have as a new one.
        named: it was asked for, so ``auto`` means the run in it and no other.

    Raises:
        ValueError: ``resume`` names nothing that exists, or ``auto`` finds only runs with other settings.
    """
    wanted = str(cfg.resume)
    if wanted == "never":
        return None, folder
    if wanted == "auto" and named:
        if (last := last_of(cfg, folder)) is None:
            log.info("resume=auto: no run in %s; starting fresh", folder)
        return last, folder
    if wanted == "auto":
        run = newest(cfg, folder, LAST)
        return (None, folder) if run is None else (run / LAST, run)
    path = Path(wanted).expanduser()
    if path.is_dir():
        path = path / LAST if (path / LAST).exists() else path / "last.ckpt"
    if not path.is_file():
        raise ValueError(f"resume={wanted}: there is no checkpoint {path}; allowed is never, auto, or an existing PATH")
    return path, folder


def newest(cfg: DictConfig, folder: Path, mark: str) -> Path | None:
    """The newest unfinished run beside a folder that has the file ``mark`` and the settings of ``cfg``.

    Raises:
        ValueError: there are only runs with other settings.
    """
    found = [run for run in folder.parent.glob("*") if (run / mark).exists() and (run / "config.yaml").exists()]
    found = [run for run in found if not (run / "done").exists()]
    found.sort(key=lambda run: (run / mark).stat().st_mtime, reverse=True)
    if not found:
        log.info("resume=auto: no unfinished run in %s; starting fresh", folder.parent)
        return None
    same = next((run for run in found if not differing(cfg, run)), None)
    if same is None:
        also = f", or resume={found[0]} to start from its weights" * (mark == LAST)
        refuse_other(cfg, found[0], f"Set them alike{also}, or resume=never to start fresh")
    return same


def last_of(cfg: DictConfig, folder: Path) -> Path | None:
    """The last checkpoint of a run that must have this folder: a job of a sweep, a stage of a curriculum, ``folder=``.

    Raises:
        ValueError: it was begun with other settings.
    """
    if not (folder / LAST).exists():
        return None
    refuse_other(cfg, folder)
    return folder / LAST


def refuse_other(cfg: DictConfig, run: Path, remedy: str = "Remove it to start afresh") -> None:
    """Raises: ValueError: the run in a folder has other settings than ``cfg``."""
    if changes := differing(cfg, run):
        raise ValueError(f"{run} was begun with other settings: {'; '.join(changes)}. {remedy}")


def refuse_used(cfg: DictConfig, folder: Path) -> None:
    """A fresh start must not write over anything of another run: checkpoints, a tokenizer, tables.

    Raises:
        ValueError: a run was finished in the folder, or begun with other settings.
    """
    if any((folder / "checkpoints").glob("*.ckpt")):
        raise ValueError(f"folder={folder}: it holds the checkpoints of a run; use resume=auto, or another folder")
    if (folder / "done").exists():
        raise ValueError(f"folder={folder}: it holds a finished run; use another folder")
    if (folder / "config.yaml").exists() and not (folder / "error.txt").exists():  # what failed was none, without one
        refuse_other(cfg, folder, "Use another folder, or remove it")


def begun_with(checkpoint: Path | None) -> dict | None:
    """The config of the run that wrote a checkpoint; ``None`` where there is no checkpoint, or no config in it."""
    return None if checkpoint is None else read(checkpoint).get("config")


def best(run: Path) -> Path:
    """The best checkpoint of a run folder, or the last one where its stage monitors nothing.

    Raises:
        ValueError: it has none.
    """
    for name in ("best.ckpt", "last.ckpt"):
        for path in (run / "checkpoints" / name, run / name):
            if path.exists():
                return path
    raise ValueError(f"{run}: there is no checkpoint in it, neither best.ckpt nor last.ckpt")


def differing(cfg: DictConfig, run: Path, finished: bool = False) -> list[str]:
    """``key: then -> now`` of each setting in which ``cfg`` differs from the run in a folder.

    Args:
        finished: the run's results are asked for, not its checkpoint: then its length must be the same too.
    """
    before = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    trial = cfg.copy()
    OmegaConf.set_struct(trial, False)
    paced = before.get("preset", {}).get("minutes") is not None  # time has decided these there
    length = LENGTH if not finished else ("preset.steps", "trainer.max_steps") if paced else ("preset.minutes",)
    for key in (*length, *FREE, *(PACED if paced else ())):  # taken over, so that whatever interpolates them agrees too
        value = OmegaConf.select(OmegaConf.create(before), key)
        given = value is not None or key == "preset.minutes"  # that a run counts steps is its length too
        if given and OmegaConf.select(trial, key) is not None:
            OmegaConf.update(trial, key, value, merge=False)
    return differences(before, plain(trial))


def differences(before, now, key: str = "") -> list[str]:
    """Leaf by leaf ``key: before -> now`` of two nested dicts, free keys left out."""
    if key in FREE:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for name in sorted({*before, *now}, key=str):
            inner = f"{key}.{name}" if key else str(name)
            found += differences(before.get(name, "(unset)"), now.get(name, "(unset)"), inner)
        return found
    if key.endswith("_target_"):
        before, now = (HOUSE.sub("", str(name)) for name in (before, now))
    return [] if before == now else [f"{key}: {before} -> {now}"]


def read(path: Path, setting: str = "resume") -> dict:
    """A checkpoint's content; ``setting`` is what has named it, for messages.

    Raises:
        ValueError: it is no checkpoint of plain dicts and tensors. Nothing in it is executed.
    """
    import torch

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{setting}={path}: refused, it holds more than plain dicts and tensors") from error
    except (RuntimeError, EOFError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"{setting}={path}: it is no checkpoint, or a damaged one ({said})") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters"} <= checkpoint.keys():
        raise ValueError(f"{setting}={path}: it is no checkpoint of a training run")
    return checkpoint


def check_fits(stage, path: Path) -> dict:
    """Refuse a checkpoint of another architecture; -> its content.

    Raises:
        ValueError: names the settings that differ, and one tensor that shows it.
    """
    checkpoint = read(path)
    probe = {**checkpoint, "state_dict": dict(checkpoint["state_dict"])}
    try:
        stage.on_load_checkpoint(probe)  # a stage may leave frozen weights out of its checkpoints
    except ValueError as error:  # it says what of it is not this stage's
        raise ValueError(f"resume={path}: {error}") from error
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"resume={path}: it is a checkpoint of another stage ({error})") from error
    saved = {name: tuple(value.shape) for name, value in probe["state_dict"].items()}
    mine = {name: tuple(value.shape) for name, value in stage.state_dict().items()}
    if saved != mine:
        there, here = {*checkpoint["hyper_parameters"]}, {*stage.hparams}
        if there != here:
            gone, new = (", ".join(sorted(names)) or "nothing" for names in (there - here, here - there))
            raise ValueError(f"resume={path}: it is a checkpoint of another stage: only there {gone}; only here {new}")
        odd = next(name for name in sorted({*saved, *mine}) if saved.get(name) != mine.get(name))
        keys = with_weights(differences(checkpoint["hyper_parameters"], dict(stage.hparams), "stage"))
        shapes = f"{odd}: {saved.get(odd, 'absent')} there, {mine.get(odd, 'absent')} here"
        raise ValueError(f"resume={path}: it has another architecture: {'; '.join(keys)} ({shapes})")
    return checkpoint


def check_source(checkpoint: dict, source: str | None, resume: str) -> str | None:
    """Whether the texts are those of the checkpoint; -> what is to be said where they are not, and it was asked for.

    Args:
        source: fingerprint of the texts now.
        resume: the setting; a path asks for this checkpoint, whatever has changed.

    Raises:
        ValueError: the run would go on by itself with other texts.
    """
    then = checkpoint.get("source")
    if then is None or then == source:
        return None
    if resume in ("never", "auto"):
        raise ValueError(
            f"resume={resume}: the texts of data.source have changed since this run was stopped (fingerprint {then},"
            f" now {source}). Put them back, or take another folder with resume=PATH (its weights) or resume=never"
        )
    return f"the texts of data.source: fingerprint {then} -> {source}"


def with_weights(changes: list[str]) -> list[str]:
    """Those of ``differences`` that may be why tensors have other shapes, the base's first."""
    found = [line for line in changes if not WEIGHTLESS.search(line.partition(":")[0])]
    return sorted(found, key=lambda line: (not line.startswith("stage.base."), "width" not in line.partition(":")[0]))


def check_accumulation(checkpoint: dict, config: dict) -> None:
    """Refuse to go on with another accumulation: Lightning counts batches, and would end the steps elsewhere.

    Raises:
        ValueError: says what the checkpoint was written with.
    """
    key = "trainer.accumulate_grad_batches"
    then, now = (OmegaConf.select(OmegaConf.create(c), key) for c in (checkpoint.get("config", config), config))
    if then != now:
        raise ValueError(f"preset.accumulate={now}: the checkpoint was written with {then}; set that")
