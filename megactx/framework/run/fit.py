"""One run: the stage, the data and the trainer of a config, the training, the report.

torch and lightning are imported inside the functions, so that nothing waits for them that does not train.
"""

import contextlib
import sys
from pathlib import Path

from hydra.errors import InstantiationException
from omegaconf import DictConfig

from . import distributed


def build_and_run(cfg: DictConfig, config: dict, folder: Path, device, checkpoint: Path | None) -> float | None:
    """Build stage, data and trainer, train, and let the stage report.

    Args:
        cfg: the validated config; ``config`` is the same as plain dicts, which checkpoints keep.
        folder: the run folder.
        device: as ``device.choose`` found it.
        checkpoint: to go on from.

    Returns:
        the lowest value of what the stage monitors; ``None`` where it monitors nothing.
    """
    import lightning
    from hydra.utils import instantiate

    from ..callbacks.checkpoints import Record
    from .pace import announce

    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    stage = instantiate(cfg.stage, _convert_="all")
    if not isinstance(stage, lightning.LightningModule):
        if checkpoint is not None:
            raise ValueError(f"resume={cfg.resume}: this stage does not train in steps; use resume=never")
        stage.run(folder)
        return None
    announce(stage, config, device)
    datamodule = instantiate(cfg.datamodule, _convert_="all")
    source = getattr(datamodule, "source", None)
    fingerprint = source.fingerprint() if hasattr(source, "fingerprint") else None
    if hasattr(source, "write_list") and not distributed.rank():  # what the text was, where nobody else can tell
        source.write_list(folder / "files.sha256")
    stage.prepare(datamodule)
    trainer, step = _trainer(cfg, config, folder, device, fingerprint), 0
    if checkpoint is None and config["stage"].get("init"):
        print(stage.start_from(config["stage"]["init"]), flush=True)
    if checkpoint is not None:
        from .resume import check_accumulation, check_fits, check_source, differences

        saved = check_fits(stage, checkpoint)
        check_accumulation(saved, config)
        changed = check_source(saved, fingerprint, str(cfg.resume))
        print(f"Going on from {checkpoint}, step {saved['global_step']}", flush=True)
        for line in [*([changed] if changed else []), *differences(saved.get("config", config), config)]:
            print(f"  changed: {line}", flush=True)
        step = saved["global_step"]
        del saved
    for logger in trainer.loggers:
        if hasattr(logger, "rewind"):  # what was logged behind the checkpoint, or by a run that failed without one
            logger.rewind(step)
    try:
        trainer.fit(stage, datamodule, ckpt_path=checkpoint, weights_only=True)
    except BaseException:
        distributed.stop_others(trainer)
        raise
    if trainer.checkpoint_callbacks and not trainer.fast_dev_run:
        # The last step need not be one at which a checkpoint is due; what is reported is what is saved.
        with next(callback for callback in trainer.callbacks if isinstance(callback, Record)).going_on(stage):
            trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    if distributed.leave(trainer) and not trainer.fast_dev_run:
        if stage.reports_best:
            _take_best(stage, folder / "checkpoints" / "best.ckpt", trainer.global_step)
        stage.to(trainer.strategy.root_device)  # Lightning moves it to the CPU at the end
        stage.finish(folder, datamodule)
        for logger in trainer.loggers:
            if hasattr(logger, "keep"):
                logger.keep(folder)
    return _lowest(trainer)


def check_data(cfg: DictConfig, whole: bool = True) -> None:
    """Build a stage and its data, and let the data find what it needs, without training.

    Args:
        whole: all is there that the stage is built from; else only its texts and conversations are looked for.

    Raises:
        ValueError: a text or a domain is missing; it names the setting.
    """
    from hydra.utils import instantiate

    if not whole:
        for group in ("data", "conversations"):
            instantiate(cfg[group].source, _convert_="all")
        return
    if cfg.datamodule is None:
        return
    stage = instantiate(cfg.stage, _convert_="all")
    datamodule = instantiate(cfg.datamodule, _convert_="all")
    stage.prepare(datamodule)
    datamodule.setup("fit")
    stage.check_data(datamodule)


def other_content(cfg: DictConfig, run: Path) -> list[str]:
    """What a finished run was made of that is another thing now under the same name: its texts, its base LM.

    Texts and models that are gone contradict nothing.
    """
    from hydra.utils import instantiate

    from ..config.validate import locate
    from .resume import LAST, read

    if not (run / LAST).exists() or cfg.get("datamodule") is None:
        return []
    saved, found = read(run / LAST), []
    with contextlib.suppress(InstantiationException, ValueError):
        source = getattr(instantiate(cfg.datamodule, _convert_="all"), "source", None)
        now = source.fingerprint() if hasattr(source, "fingerprint") else None
        if saved.get("source") not in (None, now):
            found.append(f"the texts of data.source: fingerprint {saved['source']} -> {now}")
    with contextlib.suppress(ValueError):
        then, now = saved.get("base"), locate(cfg.stage["_target_"]).base_of(cfg.stage)
        if then and now and any(then.get(what, now[what]) != now[what] for what in ("embeddings", "weights")):
            found.append(f"the base LM: {then['name']} has other weights now")
    return found


def _lowest(trainer) -> float | None:
    """The lowest value of what the stage monitors, where ``best.ckpt`` is kept."""
    from ..callbacks.checkpoints import Best

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


def _trainer(cfg: DictConfig, config: dict, folder: Path, device, source: str | None):
    from hydra.utils import instantiate
    from lightning.pytorch.callbacks import Checkpoint, ProgressBar

    from ..callbacks.checkpoints import AtomicCheckpointIO, RandomState, Record
    from ..callbacks.stopping import StopOnBadLoss, StopOnInterrupt

    chosen = [instantiate(node, _convert_="all") for node in cfg.callbacks.values() if node]
    # Lightning adds a bar and a checkpoint of its own where it is not told otherwise.
    trainer = instantiate(cfg.trainer, _partial_=True, _convert_="all")(
        accelerator=device.accelerator,
        precision=device.precision,
        callbacks=[StopOnBadLoss(), RandomState(), Record(config, source), *chosen, StopOnInterrupt(folder)],
        logger=[instantiate(node, _convert_="all") for node in cfg.logger.values() if node] or False,
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in chosen),
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in chosen),
    )
    if trainer.max_steps > 0:  # a run that is shorter than the log's stride would leave no row of its training
        trainer.log_every_n_steps = min(trainer.log_every_n_steps, trainer.max_steps)
    return trainer


def finish_loggers(code: int) -> None:
    """Close what a run has opened: the next one is a run of its own."""
    if "wandb" in sys.modules:
        import wandb

        if wandb.run is not None:
            wandb.finish(exit_code=code)
