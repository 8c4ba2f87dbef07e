"""What ``train.py`` does: compose, validate, build, run, finish; and fail in words a person can use.

torch and lightning are imported inside the functions, so that ``--cfg job``, ``--help`` and a typo answer at once.
"""

import contextlib
import io
import os
import sys
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from . import sweep
from .errors import DONE, INTERRUPTED, MISTAKE, Interrupted, composition_message, verdict
from .runfolder import HIDDEN, hide_in_command, hide_secrets, write_error
from .search_path import VERSION_BASE, compose, register, root

_code = DONE  # of the run that Hydra called; Hydra itself drops it


def run(argv: list[str] | None = None) -> int:
    """Run the command line; -> exit code 0 done, 2 a user's mistake, 3 a failed run, 130 interrupted."""
    global _code
    before = sys.argv
    arguments = sys.argv[1:] if argv is None else list(argv)
    sys.argv = [before[0] if argv is None else "train.py", *arguments]
    overrides = [a for a in arguments if not a.startswith("-")]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come back here instead of being printed and exited
    register()
    _code = DONE
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown) if _shows_config(arguments) else contextlib.nullcontext():
            main()
    except SystemExit as stop:  # --help, or Hydra's own argument parser
        _code = stop.code if isinstance(stop.code, int) else (DONE if stop.code is None else MISTAKE)
    except KeyboardInterrupt:
        _say("interrupted before anything was saved")
        _code = INTERRUPTED
    except Exception as error:
        _say(composition_message(error, overrides))
        _code = MISTAKE
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
    if _shows_config(arguments):
        sys.stdout.write(_without_secrets(shown.getvalue()))
    _code = sweep.summary() or _code
    return _code


@hydra.main(config_path=str(root("configs")), config_name="config", version_base=VERSION_BASE)
def main(cfg: DictConfig) -> None:
    """The task that Hydra calls, once per job. It never raises an ``Exception``: a sweep goes on with the next job."""
    global _code
    here = HydraConfig.get()
    overrides = list(here.overrides.task)
    folder = Path(here.runtime.output_dir)
    multirun = here.mode == RunMode.MULTIRUN
    kept: list[Path] = []  # the run folder, once there is one
    if multirun and (folder / "done").exists():
        sweep.note(folder, overrides, "done before", DONE)
        return
    if multirun:
        sweep.note(folder, overrides, "running")
    try:
        _train(cfg, here, folder, kept)
        _code, state, message = DONE, "done", ""
    except (KeyboardInterrupt, Interrupted, SystemExit) as stop:  # Lightning exits where Ctrl-C comes a second time
        message = _how_to_go_on(str(stop) if isinstance(stop, Interrupted) else "interrupted", kept, overrides)
        _code, state = INTERRUPTED, "interrupted"
        _say(message)
    except Exception as error:
        _code, message = verdict(error)
        _say(message + write_error(kept[0] if kept else None))
        state = "failed"
    finally:
        _finish_loggers()
        if not multirun:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only where nothing was written: Hydra makes it before the config is checked
    if multirun:
        sweep.note(folder, overrides, state, _code, message)
        if _code == INTERRUPTED:
            raise KeyboardInterrupt


def _train(cfg: DictConfig, here, folder: Path, kept: list[Path]) -> None:
    from .device import choose
    from .resume import find, plain
    from .runfolder import close_folder, logs, open_folder, quiet_bars, show
    from .validate import validate

    quiet_bars()
    OmegaConf.set_struct(cfg, False)
    cfg.folder = _short(folder)
    validate(cfg, _reference(here.runtime.choices))
    device = choose(
        cfg.trainer.accelerator, cfg.trainer.precision, cfg.trainer.devices, here.runtime.choices["trainer"]
    )
    with _early_logs():
        if here.mode == RunMode.MULTIRUN:
            checkpoint, target = _own_checkpoint(cfg, folder)
        else:
            checkpoint, target = find(cfg, folder)
    if checkpoint is None or checkpoint.parent != target / "checkpoints":
        _refuse_used(target)
    cfg.folder = _short(target)
    config = plain(cfg)
    open_folder(target, config, list(here.overrides.task), device.why)
    kept.append(target)
    with logs(target):
        show(config, device.why, cfg.folder)
        _build_and_run(cfg, config, target, device, checkpoint)
    close_folder(target)
    print(f"Everything is in {cfg.folder}")


def _build_and_run(cfg: DictConfig, config: dict, folder: Path, device, checkpoint: Path | None) -> None:
    import lightning
    from hydra.utils import instantiate

    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    stage = instantiate(cfg.stage, _convert_="all")
    if not isinstance(stage, lightning.LightningModule):
        if checkpoint is not None:
            raise ValueError(f"resume={cfg.resume}: this stage does not train in steps; use resume=never")
        stage.run(folder)
        return
    datamodule = instantiate(cfg.datamodule, _convert_="all")
    if hasattr(stage, "prepare"):
        stage.prepare(datamodule)
    source = getattr(datamodule, "source", None)
    if hasattr(source, "write_list"):  # what the text was, where nobody else can tell
        source.write_list(folder / "files.sha256")
    if hasattr(stage, "prepare"):
        stage.prepare(datamodule)
    trainer = _trainer(cfg, config, folder, device)
    if checkpoint is not None:
        from .resume import check_fits, differences

        saved = check_fits(stage, checkpoint)
        print(f"Going on from {checkpoint}, step {saved['global_step']}", flush=True)
        for line in differences(saved.get("config", config), config):
            print(f"  changed: {line}", flush=True)
        del saved
    trainer.fit(stage, datamodule, ckpt_path=checkpoint, weights_only=True)
    if trainer.checkpoint_callbacks and not trainer.fast_dev_run:
        # The last step need not be one at which a checkpoint is due; what is reported is what is saved.
        trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    if hasattr(stage, "finish") and not trainer.fast_dev_run:
        stage.to(trainer.strategy.root_device)  # Lightning moves it to the CPU at the end
        stage.finish(folder, datamodule)


def _trainer(cfg: DictConfig, config: dict, folder: Path, device):
    from hydra.utils import instantiate
    from lightning.pytorch.callbacks import Checkpoint, ProgressBar

    from .checkpoints import AtomicCheckpointIO, RandomState, Record
    from .guards import StopOnBadLoss, StopOnInterrupt

    chosen = [instantiate(node, _convert_="all") for node in cfg.callbacks.values()]
    # Lightning adds a bar and a checkpoint of its own where it is not told otherwise.
    return instantiate(cfg.trainer, _partial_=True, _convert_="all")(
        accelerator=device.accelerator,
        precision=device.precision,
        callbacks=[StopOnBadLoss(), RandomState(), Record(config), StopOnInterrupt(folder), *chosen],
        logger=[instantiate(node, _convert_="all") for node in cfg.logger.values()] or False,
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in chosen),
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in chosen),
    )


def _reference(choices) -> DictConfig:
    """The chosen parts without the values of the experiment and of the command line."""
    groups = {g: c for g, c in choices.items() if not g.startswith("hydra/") and g != "experiment" and c is not None}
    return compose([f"{group}={choice}" for group, choice in groups.items()])


def _own_checkpoint(cfg: DictConfig, folder: Path) -> tuple[Path | None, Path]:
    """A job of a sweep has a fixed folder: what it left there is where it goes on."""
    from .resume import differing

    last = folder / "checkpoints" / "last.ckpt"
    if not last.exists():
        return None, folder
    if changes := differing(cfg, folder):
        raise ValueError(f"{folder} was begun with other settings: {'; '.join(changes)}. Remove it to start afresh")
    return last, folder


@contextlib.contextmanager
def _early_logs():
    """Before there is a run folder, our messages go to stdout."""
    import logging

    own, handler = logging.getLogger("megactx"), logging.StreamHandler(sys.stdout)
    level = own.level
    own.addHandler(handler)
    own.setLevel(logging.INFO)
    try:
        yield
    finally:
        own.removeHandler(handler)
        own.setLevel(level)


def _finish_loggers() -> None:
    if "wandb" in sys.modules:
        import wandb

        if wandb.run is not None:  # the next job of a sweep is a run of its own
            wandb.finish(exit_code=_code)


def _how_to_go_on(what: str, kept: list[Path], overrides: list[str]) -> str:
    if not kept or not (kept[0] / "checkpoints" / "last.ckpt").exists():
        return f"{what}; no checkpoint was saved yet"
    again = [override for override in hide_in_command(overrides) if not override.startswith("resume=")]
    return f"{what}. Go on with: python train.py {' '.join([*again, 'resume=auto'])}"


def _refuse_used(folder: Path) -> None:
    """A fresh start must not write over another run's checkpoints."""
    if any((folder / "checkpoints").glob("*.ckpt")):
        raise ValueError(f"folder={folder}: it holds the checkpoints of a run; use resume=auto, or another folder")


def _short(folder: Path) -> str:
    """Relative to the working directory where it is below it."""
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)


def _shows_config(arguments: list[str]) -> bool:
    return any(a in ("--cfg", "-c") or a.startswith("--cfg=") for a in arguments)


def _without_secrets(text: str) -> str:
    with contextlib.suppress(Exception):  # not a config: an error message, printed as it is
        tree = OmegaConf.to_container(OmegaConf.create(text))
        hidden = OmegaConf.to_yaml(OmegaConf.create(hide_secrets(tree)))
        return hidden if HIDDEN in hidden else text
    return text


def _say(message: str) -> None:
    print(f"megactx: {message}", file=sys.stderr, flush=True)
