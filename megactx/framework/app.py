"""What ``train.py`` does: compose, validate, build, run, finish; and fail in words a person can use.

torch and lightning are imported inside the functions, so that ``--cfg job``, ``--help`` and a typo answer at once.
"""

import contextlib
import io
import os
import shlex
import sys
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from .config.config_docs import help_text
from .config.search_path import VERSION_BASE, reference, register, root
from .errors import DONE, FAILED, FULL, INTERRUPTED, MISTAKE, Interrupted, RunFailed, composition_message, verdict
from .run import distributed
from .run.fit import build_and_run, finish_loggers
from .run.runfolder import HIDDEN, hide_in_command, hide_secrets, short, write_error
from .sweep import jobs

_code = DONE  # of the run that Hydra called; Hydra itself drops it


def run(argv: list[str] | None = None) -> int:
    """Run the command line; -> exit code 0 done, 2 a user's mistake, 3 a failed run, 130 interrupted."""
    global _code
    before = sys.argv
    arguments = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & {*arguments}:
        _tell(help_text())
        return DONE
    arguments = _flags_first(arguments)
    sys.argv = [before[0] if argv is None else "train.py", *arguments]
    overrides = [a for a in arguments if not a.startswith("-")]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come back here instead of being printed and exited
    register()
    distributed.hush()
    _code = DONE
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown) if _shows_config(arguments) else contextlib.nullcontext():
            main()
    except SystemExit as stop:  # --help, or Hydra's own argument parser
        _code = stop.code if isinstance(stop.code, int) else (DONE if stop.code is None else MISTAKE)
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on" if jobs.begun() else "interrupted before anything was saved")
        _code = INTERRUPTED
    except Exception as error:
        # Hydra makes the folder of a run before anything of ours is asked; its own errors are OSErrors too, of no file.
        if isinstance(error, OSError) and error.filename:
            full = error.errno in FULL
            place = "disk" if full else "place"
            _say(f"{error.filename} cannot be written ({error.strerror}); set folder=... to another {place}")
            _code = FAILED if full or jobs.jobs_begun() else MISTAKE
        else:
            _say(composition_message(error, overrides))
            _code = FAILED if jobs.jobs_begun() else MISTAKE
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
    if _shows_config(arguments):
        _tell(_without_secrets(shown.getvalue()).removesuffix("\n"))
    told = jobs.summary()
    _code = _code if _code == INTERRUPTED else told or _code
    return _code


def _flags_first(arguments: list[str]) -> list[str]:
    """``-m`` between two overrides means the same as in front of them; Hydra's parser would refuse what follows it."""
    flags = [a for a in arguments if a in ("-m", "--multirun")]
    return [*flags[:1], *(a for a in arguments if a not in flags)]


def _tell(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # whoever read it, such as head, has gone; Python would complain once more at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    with jobs.alone(folder):
        if not (folder / "done").exists():
            jobs.note(folder, "running")
            return _run_job(cfg, here, folder, multirun=True)
        return _done_before(cfg, folder)


def _done_before(cfg: DictConfig, folder: Path) -> float | None:
    """A job of a sweep that has its result already; that of other settings, say of an experiment file that was edited
    since, is refused."""
    from .run.curriculum import changed

    try:
        changes = changed(cfg, list(HydraConfig.get().overrides.task), folder)
    except Exception as error:  # a stage that does not compose any more, a record that cannot be read
        changes = [verdict(error)[1]]
    if changes:
        message = f"{folder} was done otherwise: {'; '.join(changes)}. Remove it to run the job again"
        _say(message)
        jobs.note(folder, "refused", MISTAKE, message)
        return None
    value = jobs.value_before(folder)
    jobs.note(folder, "done before", DONE, value=value)
    return value


def _run_job(cfg: DictConfig, here, folder: Path, multirun: bool) -> float | None:
    global _code
    overrides = list(here.overrides.task)
    kept: list[Path] = []  # the run folder, once there is one
    value = None
    try:
        with distributed.own_environment():
            value = _train(cfg, here, folder, kept)
        _code, state, message = DONE, "done", ""
    except (KeyboardInterrupt, Interrupted, SystemExit) as stop:  # Lightning exits where Ctrl-C comes a second time
        message = _how_to_go_on(str(stop) if isinstance(stop, Interrupted) else "interrupted", kept, overrides)
        _code, state = distributed.joint(INTERRUPTED, DONE), "interrupted"
        if _code:
            _say(message)
    except Exception as error:
        _code, message = verdict(error)
        if isinstance(error, RunFailed):
            _code = distributed.joint(_code, DONE)
        if _code:
            _say(message + write_error(kept[-1] if kept else None))
        state = "failed"
    finally:
        finish_loggers(_code)
        if not multirun and folder != Path.cwd():
            with contextlib.suppress(OSError):
                folder.rmdir()  # only where nothing was written: Hydra makes it before the config is checked
    if multirun:
        jobs.note(folder, state, _code, message, value)
        if _code == INTERRUPTED:
            raise KeyboardInterrupt
    return value


def _train(cfg: DictConfig, here, folder: Path, kept: list[Path]) -> float | None:
    from .config.validate import refuse_idle, validate
    from .run.curriculum import find_curriculum, run_in_turn, stages_of
    from .run.device import choose
    from .run.pace import settle
    from .run.resume import begun_with, find, last_of, plain, refuse_used
    from .run.runfolder import close_folder, held, logs, open_folder, quiet_bars, show

    quiet_bars()
    refuse_idle(list(here.overrides.task), here.runtime.choices)
    OmegaConf.set_struct(cfg, False)
    if not str(cfg.get("folder", "")).strip():  # the run would lie about in the folder that one works in
        raise ValueError("folder=: it is empty; set it, or leave it out")
    cfg.folder = short(folder)
    known, shared = reference(here.runtime.choices, cfg), None
    validate(cfg, known)
    if here.mode == RunMode.MULTIRUN:
        shared = Path(here.sweep.dir)
    device = choose(
        cfg.trainer.accelerator,
        cfg.trainer.precision,
        cfg.trainer.devices,
        here.runtime.choices["trainer"],
        cfg.trainer.get("strategy"),
    )

    named, hosts = any(o.startswith("folder=") for o in here.overrides.task), cfg.trainer.get("num_nodes", 1)
    distributed.refuse_own_folders(hosts, named or here.mode == RunMode.MULTIRUN)

    def decide() -> tuple[Path | None, Path]:
        if cfg.curriculum:
            fixed = here.mode == RunMode.MULTIRUN or (named and cfg.resume == "auto")
            return None, find_curriculum(cfg, folder, fixed)
        if here.mode == RunMode.MULTIRUN:
            distributed.refuse_sweep(device.count * hosts)
            if cfg.resume not in ("never", "auto"):
                raise ValueError(
                    f"resume={cfg.resume} is not allowed with -m: jobs of a sweep go on by themselves; stage.init=..."
                    " takes weights of another run"
                )
            return last_of(cfg, folder), folder
        return find(cfg, folder, named)

    with logs(None):  # before there is a run folder
        checkpoint, target = distributed.agreed(decide)
    if not cfg.curriculum and (checkpoint is None or checkpoint.parent != target / "checkpoints"):
        refuse_used(cfg, target)
    stages, cut = stages_of(cfg, here, target, device), ""
    if not stages:
        cut = settle(cfg, list(here.overrides.task), known, begun_with(checkpoint), device, shared)
    cfg.folder = short(target)
    config = plain(cfg)
    value = None
    # A job of a sweep holds its folder already.
    with contextlib.nullcontext() if here.mode == RunMode.MULTIRUN else held(target), contextlib.ExitStack() as stack:
        open_folder(target, config, list(here.overrides.task), device.why)
        kept.append(target)
        stack.enter_context(logs(target))
        if stages:
            run_in_turn(stages, list(here.overrides.task), target, device, kept, shared)
        else:
            show(config, device.why, cfg.folder)
            value = build_and_run(cfg, config, target, device, checkpoint)
        close_folder(target)
    if cut:
        print(cut)
    print(f"Everything is in {cfg.folder}")
    return value


def _how_to_go_on(what: str, kept: list[Path], overrides: list[str]) -> str:
    if not kept or not any(kept[0].rglob("last.ckpt")):
        return f"{what}; no checkpoint was saved yet"
    again = [override for override in hide_in_command(overrides) if not override.startswith("resume=")]
    return f"{what}. Go on with: {shlex.join(['python', 'train.py', *again, 'resume=auto'])}"


def _shows_config(arguments: list[str]) -> bool:
    return any(a in ("--cfg", "-c") or a.startswith("--cfg=") for a in arguments)


def _without_secrets(text: str) -> str:
    with contextlib.suppress(Exception):  # not a config: an error message, printed as it is
        tree = OmegaConf.to_container(OmegaConf.create(text))
        hidden = OmegaConf.to_yaml(OmegaConf.create(hide_secrets(tree)))
        return hidden if HIDDEN in hidden else text
    return text


def _say(message: str) -> None:
    who = f"megactx, process {distributed.rank()}" if distributed.rank() else "megactx"
    print(f"{who}: {message}", file=sys.stderr, flush=True)
