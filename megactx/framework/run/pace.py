"""How long a run takes on this machine: a preset may have minutes instead of steps, and a long run says so first.

``preset.minutes`` becomes a number of steps before anything is built for good: the first steps are tried and timed, and
from then on the number counts. It stands in the run's config and in its checkpoints, so a resumed run has the same one,
and so have all jobs of a sweep.
"""

import contextlib
import json
import os
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ..callbacks.checkpoints import LATEST
from ..lock import Lock
from . import distributed
from .resume import PACED
from .runfolder import quiet, write

TRIED = 6  # steps that are timed, behind a first one that is not
REACHED = 0.4  # of the rate of one large product, by a step of the demo on two CPU cores
LONG = 10 * 60  # seconds from which on a run says how long it takes
_FIXED = "MEGACTX_LENGTH"  # reaches the processes that Lightning starts
distributed.carry(_FIXED)


def by_time(cfg: DictConfig, overrides: list[str], reference: DictConfig) -> bool:
    """Whether ``preset.minutes`` decides how many steps a run has.

    Args:
        overrides: of the command line.
        reference: the same group choices without the experiment's and the command line's values.

    Raises:
        ValueError: minutes are given by hand and say nothing here.
    """
    from ..config.validate import locate

    given = by_hand(overrides)
    minutes, timed = cfg.preset.get("minutes"), locate(cfg.stage["_target_"]).timed
    mine, group = (OmegaConf.to_container(tree.preset, resolve=False) for tree in (cfg, reference))
    if "preset.minutes" in given and minutes is not None and not timed:
        raise ValueError(f"preset.minutes={minutes} says nothing here: other settings make the run's length")
    # The minutes of a group are not those of an experiment that counts steps, unless it has minutes of its own.
    own = "preset.minutes" in given or mine["minutes"] != group["minutes"]
    asked = own or mine["steps"] == group["steps"]
    return minutes is not None and timed and asked and not {"preset.steps", "trainer.max_steps"} & given


def by_hand(overrides: list[str]) -> set[str]:
    """The settings that the command line gives."""
    return {override.lstrip("+~").partition("=")[0] for override in overrides}


def settle(cfg: DictConfig, overrides, reference: DictConfig, before: dict | None, device, shared: Path | None) -> str:
    """Set how many steps a run has, where its time decides, and what has a share of them.

    Returns:
        What a person must know at the end: that time has cut the steps; empty where it has not.

    Args:
        cfg: the run's config, which is changed.
        overrides, reference: see ``by_time``.
        before: the config of the run that this one goes on from; its numbers count.
        device: as ``device.choose`` found it.
        shared: the folder of a sweep, whose jobs all take the number of the first; ``None`` for a run of its own.
    """
    given, found, most = by_hand(overrides), {}, cfg.preset.steps
    paced = before is not None and before.get("preset", {}).get("minutes") is not None
    if paced:
        found = {key: _plain(OmegaConf.create(before), key) for key in ("preset.steps", *PACED)}
        found = {key: value for key, value in found.items() if value is not None}
    if not by_time(cfg, overrides, reference):
        if "minutes" in cfg.preset:
            cfg.preset.minutes = None  # what is kept is what counts
        found.pop("preset.steps", None)
    elif not paced and distributed.rank() and _FIXED in os.environ:
        found = json.loads(os.environ[_FIXED])
    elif not paced:
        with _of_sweep(shared, cfg) as known:
            found = dict(known) or _timed(cfg, device, given)
            known.update(found)
    os.environ[_FIXED] = json.dumps(found)
    for key, value in found.items():
        if key not in given:
            OmegaConf.update(cfg, key, value)
    if cfg.preset.get("minutes") is None or cfg.preset.steps >= most:
        return ""
    return (
        f"preset.minutes={cfg.preset.minutes:g} gave {cfg.preset.steps:,} of {most:,} steps on this machine;"
        " preset.minutes=null takes all of them, for better numbers"
    )


@contextlib.contextmanager
def _of_sweep(folder: Path | None, cfg: DictConfig):
    """The numbers that a sweep has fixed for its jobs, to read and to add to; one job at a time."""
    known = {}
    if folder is None:
        yield known
        return
    path, key = folder / "lengths.json", f"{cfg.name}, preset.minutes={cfg.preset.minutes}"
    with Lock(folder / ".lengths.lock", "", wait=True):
        every = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        known.update(every.get(key, {}))
        yield known
        write(path, json.dumps({**every, key: known}, indent=1))


def _timed(cfg: DictConfig, device, given: set[str]) -> dict:
    """Try a few steps and a validation; -> the steps that fit, and what has a share of them."""
    step, check = _try(cfg, device)
    most = cfg.preset.steps
    checks = max(1, round(most / cfg.preset.validate_every))
    fit = int((60 * cfg.preset.minutes - checks * check) / step)
    steps = min(most, max(checks, fit // checks * checks))  # whole intervals, so that the last step is validated
    found = {"preset.steps": steps}
    for key in PACED:
        if key not in given and (length := _plain(cfg, key)) is not None:
            found[key] = shorter(length, steps / most)
    print(
        f"preset.minutes={cfg.preset.minutes:g}: a step takes {step:.2f} s here, a validation {check:.1f} s: so"
        f" preset.steps={steps}, of {most} at most; preset.minutes=null takes all of them\n",
        flush=True,
    )
    return found


def _plain(cfg: DictConfig, key: str):
    value = OmegaConf.select(cfg, key)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def shorter(length, share: float):
    """A number of steps, or phases that have ``steps``, in this share of its length, at least 1."""
    if isinstance(length, list):
        return [phase | {"steps": shorter(phase["steps"], share)} for phase in length]
    return max(1, round(length * share))


def _try(cfg: DictConfig, device) -> tuple[float, float]:
    """Seconds of a step and of a validation, on a stage that is thrown away."""
    import lightning
    from hydra.utils import instantiate

    class Stopwatch(lightning.Callback):
        def __init__(self):
            self.steps, self.check = [], 0.0

        def on_train_batch_end(self, trainer, *rest) -> None:
            if trainer.global_step == len(self.steps) + 1:  # of accumulated batches the last one
                self.steps.append(time.monotonic())

        def on_validation_start(self, *rest) -> None:
            self.check = -time.monotonic()

        def on_validation_end(self, *rest) -> None:
            self.check += time.monotonic()

    print("Timing the first steps on this machine", flush=True)
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    stage, data = (instantiate(node, _convert_="all") for node in (cfg.stage, cfg.datamodule))
    stage.prepare(data)
    watch = Stopwatch()
    settings = {
        "max_steps": TRIED + 1,
        "max_epochs": -1,
        "accumulate_grad_batches": cfg.preset.accumulate,
        "val_check_interval": (TRIED + 1) * cfg.preset.accumulate,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "gradient_clip_val": cfg.trainer.gradient_clip_val,
        "use_distributed_sampler": False,
        "logger": False,
        **{f"enable_{name}": False for name in ("progress_bar", "model_summary", "checkpointing")},
    }
    with quiet():
        lightning.Trainer(
            accelerator=device.accelerator, precision=device.precision, callbacks=[watch], **settings
        ).fit(stage, data)
    return (watch.steps[-1] - watch.steps[0]) / TRIED, watch.check


def announce(stage, config: dict, device) -> None:
    """Say how long a training takes here, where that is longer than ten minutes, and how to make it short.

    It is reckoned from what ``stage.flops_ahead`` says and from how fast this machine multiplies matrices, before texts
    are read: it tells minutes from months, no more.
    """
    if distributed.rank() or config["preset"].get("minutes") is not None:  # which has just been said
        return
    seconds = stage.flops_ahead(config["datamodule"], config["preset"]) / (_flops_per_second(device) * device.count)
    if seconds > LONG:
        print(
            f"This training takes about {in_words(seconds)} on this machine, validations and report not counted.\n"
            f"Shorter: {stage.shorter}; debug=limit shows the whole run in miniature."
            f" Every {LATEST // 60} minutes there is a checkpoint: Ctrl-C stops, resume=auto goes on.\n",
            flush=True,
        )


def in_words(seconds: float) -> str:
    """``25 minutes``, ``3 hours``, ``12 days``, ``5 months``, rounded to what an estimate can mean."""
    for size, name in ((30 * 86400, "months"), (86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size or name == "minutes":
            return f"{seconds / size:.0f} {name}"
    raise AssertionError("minutes are the last")


def _flops_per_second(device) -> float:
    """What a training step reaches here: a share of what a product of two matrices does."""
    import torch

    half = str(device.precision).startswith(("bf16", "16"))
    where = {"device": "cuda" if device.accelerator == "cuda" else "cpu", "dtype": torch.bfloat16 if half else None}
    x = torch.ones(1024, 1024, **where)
    (x @ x).sum().item()
    began, products = time.monotonic(), 0
    while time.monotonic() - began < 0.2:
        (x @ x)[0, 0].item()  # waits for the device
        products += 1
    return REACHED * products * 2 * 1024**3 / (time.monotonic() - began)
