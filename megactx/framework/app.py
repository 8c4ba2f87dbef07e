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

from . import processes, sweep
from .errors import DONE, FAILED, INTERRUPTED, MISTAKE, Interrupted, RunFailed, composition_message, verdict
from .options import help_text
from .runfolder import HIDDEN, hide_in_command, hide_secrets, write_error
from .search_path import VERSION_BASE, compose, register, root

_code = DONE  # of the run that Hydra called; Hydra itself drops it


def run(argv: list[str] | None = None) -> int:
    """Run the command line; -> exit code 0 done, 2 a user's mistake, 3 a failed run, 130 interrupted."""
    global _code
    before = sys.argv
    arguments = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & {*arguments}:
        print(help_text())
        return DONE
    sys.argv = [before[0] if argv is None else "train.py", *arguments]
    overrides = [a for a in arguments if not a.startswith("-")]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come back here instead of being printed and exited
    register()
    processes.hush()
    _code = DONE
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown) if _shows_config(arguments) else contextlib.nullcontext():
            main()
    except SystemExit as stop:  # --help, or Hydra's own argument parser
        _code = stop.code if isinstance(stop.code, int) else (DONE if stop.code is None else MISTAKE)
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on" if sweep.begun() else "interrupted before anything was saved")
        _code = INTERRUPTED
    except Exception as error:
        _say(composition_message(error, overrides))
        _code = FAILED if sweep.jobs_begun() else MISTAKE
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
    if _shows_config(arguments):
        sys.stdout.write(_without_secrets(shown.getvalue()))
    told = sweep.summary()
    _code = _code if _code == INTERRUPTED else told or _code
    return _code


@hydra.main(config_path=str(root("configs")), config_name="config", version_base=VERSION_BASE)
def main(cfg: DictConfig) -> float | None:
    """The task that Hydra calls, once per job. It never raises an ``Exception``: a sweep goes on with the next job.

    Returns:
        the lowest value of what the stage monitors, which a sweeper such as Optuna's may minimise.
    """
    here = HydraConfig.get()
    folder = Path(here.runtime.output_dir)
    if here.mode != RunMode.MULTIRUN:
        return _run_job(cfg, here, folder, multirun=False)
    with sweep.alone(folder):
        if not (folder / "done").exists():
            sweep.note(folder, "running")
            return _run_job(cfg, here, folder, multirun=True)
        value = sweep.value_before(folder)
        sweep.note(folder, "done before", DONE, value=value)
        return value


def _run_job(cfg: DictConfig, here, folder: Path, multirun: bool) -> float | None:
    global _code
    overrides = list(here.overrides.task)
    kept: list[Path] = []  # the run folder, once there is one
    value = None
    try:
        with processes.own_environment():
            value = _train(cfg, here, folder, kept)
        _code, state, message = DONE, "done", ""
    except (KeyboardInterrupt, Interrupted, SystemExit) as stop:  # Lightning exits where Ctrl-C comes a second time
        message = _how_to_go_on(str(stop) if isinstance(stop, Interrupted) else "interrupted", kept, overrides)
        _code, state = DONE if processes.rank() else INTERRUPTED, "interrupted"
        _say(message)
    except Exception as error:
        _code, message = verdict(error)
        _say(message + write_error(kept[-1] if kept else None))
        state = "failed"
        if processes.rank() and isinstance(error, RunFailed):
            _code = DONE  # all processes stopped for it, and the first one says so
    finally:
        _finish_loggers()
        if not multirun:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only where nothing was written: Hydra makes it before the config is checked
    if multirun:
        sweep.note(folder, state, _code, message, value)
        if _code == INTERRUPTED:
            raise KeyboardInterrupt
    return value


def _train(cfg: DictConfig, here, folder: Path, kept: list[Path]) -> float | None:
    from .curriculum import find_curriculum
    from .device import choose
    from .resume import find, last_of, plain
    from .runfolder import close_folder, logs, open_folder, quiet_bars, show
    from .validate import validate

    quiet_bars()
    OmegaConf.set_struct(cfg, False)
    cfg.folder = _short(folder)
    validate(cfg, _reference(here.runtime.choices))
    device = choose(
        cfg.trainer.accelerator,
        cfg.trainer.precision,
        cfg.trainer.devices,
        here.runtime.choices["trainer"],
        cfg.trainer.get("strategy"),
    )

    def decide() -> tuple[Path | None, Path]:
        if cfg.curriculum:
            return None, find_curriculum(cfg, folder, here.mode == RunMode.MULTIRUN)
        if here.mode == RunMode.MULTIRUN:
            processes.refuse_sweep(device.count)
            return last_of(cfg, folder), folder
        return find(cfg, folder)

    with _early_logs():
        checkpoint, target = processes.agreed(decide)
    if not cfg.curriculum and (checkpoint is None or checkpoint.parent != target / "checkpoints"):
        _refuse_used(target)
    stages = _stages(cfg, here, target, device)
    cfg.folder = _short(target)
    config = plain(cfg)
    open_folder(target, config, list(here.overrides.task), device.why)
    kept.append(target)
    value = None
    with logs(target):
        if stages:
            _run_in_turn(stages, list(here.overrides.task), target, device, kept)
        else:
            show(config, device.why, cfg.folder)
            value = _build_and_run(cfg, config, target, device, checkpoint)
    close_folder(target)
    print(f"Everything is in {cfg.folder}")
    return value


def _stages(cfg: DictConfig, here, folder: Path, device) -> dict[str, DictConfig]:
    """The configs of a curriculum's stages: a mistake in the last one is told before the first one runs."""
    from .curriculum import stage_config
    from .validate import validate

    if cfg.curriculum and device.count > 1:
        raise ValueError(
            f"trainer.devices={cfg.trainer.devices}: a curriculum runs on 1 device, as its processes would start anew in"
            " each stage; run its stages one by one, each with stage.init=FOLDER of the one before"
        )
    overrides, reference = list(here.overrides.task), _reference(here.runtime.choices)
    stages = {name: stage_config(name, overrides, folder) for name in cfg.curriculum}
    for stage in stages.values():
        validate(stage, reference)
    return stages


def _run_in_turn(stages: dict[str, DictConfig], overrides: list[str], folder: Path, device, kept: list[Path]) -> None:
    """A curriculum: a stage that is done is passed by, one that was begun goes on, a new one starts from the last."""
    from .resume import best, last_of, plain
    from .runfolder import close_folder, open_folder, show
    from .validate import locate

    before = None
    for index, (name, stage) in enumerate(stages.items()):
        own = folder / name
        if before is not None:
            stage.stage.init = _short(best(before))
        if not (own / "done").exists():
            checkpoint = last_of(stage, own)
            print(f"\nStage {index + 1} of {len(stages)}: {name}", flush=True)
            config = plain(stage)
            open_folder(own, config, overrides, device.why)
            kept.append(own)
            show(config, device.why, stage.folder)
            _build_and_run(stage, config, own, device, checkpoint)
            _finish_loggers()
            close_folder(own)
        before = own
    if not processes.rank():
        locate(stage.stage["_target_"]).conclude(folder, list(stages))


def _build_and_run(cfg: DictConfig, config: dict, folder: Path, device, checkpoint: Path | None) -> float | None:
    import lightning
    from hydra.utils import instantiate

    from .checkpoints import clear_parts

    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    stage = instantiate(cfg.stage, _convert_="all")
    if not isinstance(stage, lightning.LightningModule):
        if checkpoint is not None:
            raise ValueError(f"resume={cfg.resume}: this stage does not train in steps; use resume=never")
        stage.run(folder)
        return None
    datamodule = instantiate(cfg.datamodule, _convert_="all")
    if hasattr(stage, "prepare"):
        stage.prepare(datamodule)
    source = getattr(datamodule, "source", None)
    if hasattr(source, "write_list") and not processes.rank():  # what the text was, where nobody else can tell
        source.write_list(folder / "files.sha256")
    if hasattr(stage, "prepare"):
        stage.prepare(datamodule)
    trainer = _trainer(cfg, config, folder, device)
    if checkpoint is None and config["stage"].get("init"):
        print(stage.start_from(config["stage"]["init"]), flush=True)
    if not processes.rank():
        clear_parts(folder)
    if checkpoint is not None:
        from .resume import check_accumulation, check_fits, differences

        saved = check_fits(stage, checkpoint)
        check_accumulation(saved, config)
        print(f"Going on from {checkpoint}, step {saved['global_step']}", flush=True)
        for line in differences(saved.get("config", config), config):
            print(f"  changed: {line}", flush=True)
        for logger in trainer.loggers:
            if hasattr(logger, "rewind"):  # what was logged behind the checkpoint will be logged again
                logger.rewind(saved["global_step"])
        del saved
    try:
        trainer.fit(stage, datamodule, ckpt_path=checkpoint, weights_only=True)
    except BaseException:
        processes.stop_others(trainer)
        raise
    if trainer.checkpoint_callbacks and not trainer.fast_dev_run:
        # The last step need not be one at which a checkpoint is due; what is reported is what is saved.
        trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    if processes.leave(trainer) and hasattr(stage, "finish") and not trainer.fast_dev_run:
        _take_best(stage, folder / "checkpoints" / "best.ckpt", trainer.global_step)
        stage.to(trainer.strategy.root_device)  # Lightning moves it to the CPU at the end
        stage.finish(folder, datamodule)
    return _lowest(trainer)


def _lowest(trainer) -> float | None:
    """The lowest value of what the stage monitors, where ``best.ckpt`` is kept."""
    from .checkpoints import Best

    scores = [callback.best_model_score for callback in trainer.checkpoint_callbacks if isinstance(callback, Best)]
    return next((float(score) for score in scores if score is not None), None)


def _take_best(stage, path: Path, step: int) -> None:
    """What is reported is the best checkpoint: after a stop on a plateau the last one need not be it."""
    if not path.exists():
        return
    from .resume import read

    checkpoint = read(path)
    if checkpoint["global_step"] != step:
        stage.on_load_checkpoint(checkpoint)
        stage.load_state_dict(checkpoint["state_dict"])
        print(f"The report is of the best checkpoint, step {checkpoint['global_step']} of {step}", flush=True)


def _trainer(cfg: DictConfig, config: dict, folder: Path, device):
    from hydra.utils import instantiate
    from lightning.pytorch.callbacks import Checkpoint, ProgressBar

    from .checkpoints import AtomicCheckpointIO, RandomState, Record
    from .guards import StopOnBadLoss, StopOnInterrupt

    chosen = [instantiate(node, _convert_="all") for node in cfg.callbacks.values() if node]
    # Lightning adds a bar and a checkpoint of its own where it is not told otherwise.
    return instantiate(cfg.trainer, _partial_=True, _convert_="all")(
        accelerator=device.accelerator,
        precision=device.precision,
        callbacks=[StopOnBadLoss(), RandomState(), Record(config), *chosen, StopOnInterrupt(folder)],
        logger=[instantiate(node, _convert_="all") for node in cfg.logger.values() if node] or False,
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in chosen),
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in chosen),
    )


def _reference(choices) -> DictConfig:
    """The chosen parts without the values of the experiment and of the command line."""
    groups = {g: c for g, c in choices.items() if not g.startswith("hydra/") and g != "experiment" and c is not None}
    return compose([f"{group}={choice}" for group, choice in groups.items()])


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
    if not kept or not any(kept[0].rglob("last.ckpt")):
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
    who = f"megactx, process {processes.rank()}" if processes.rank() else "megactx"
    print(f"{who}: {message}", file=sys.stderr, flush=True)
