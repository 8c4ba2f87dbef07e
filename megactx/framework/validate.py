"""Checks a composed config before anything is built: all problems at once, each with what may have been meant.

Hydra catches ``gistnet.haed=mlp`` by itself, but ``+gistnet.haed=mlp``, ``+lrr=1`` and whatever an experiment file
misspells pass it silently. So every key must be known to the parts, or be an argument of its ``_target_``.
"""

import importlib
import inspect
import math

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import did_you_mean, flatten

ALLOWED = ("megactx", "torch", "lightning", "torchmetrics")
MAPPINGS = ("callbacks", "logger")  # name -> {_target_}: names are free
HYDRA_WORDS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}

WHOLE, REAL = int, (int, float)
# What can be judged without the object that takes it: kind, least, most.
RANGES = {
    "seed": (WHOLE, 0, 2**32 - 1),
    **{
        f"preset.{name}": (WHOLE, 1, math.inf)
        for name in (
            "steps batch spans accumulate validate_every validation_documents min_tokens max_tokens plateau_window"
        ).split()
    },
    "preset.warmup": (WHOLE, 0, math.inf),
    "horizon.tokens": (WHOLE, 1, math.inf),
    "contrastive.weight": (REAL, 0, math.inf),
    "contrastive.margin": (REAL, 0, 2),
    "gistnet.layers": (WHOLE, 0, math.inf),
    "gistnet.num_heads": (WHOLE, 1, math.inf),
    "gistnet.block_size": (WHOLE, 1, math.inf),
    "gistnet.dropout": (REAL, 0, 1),
    "data.min_tokens": (WHOLE, 1, math.inf),
    "data.max_tokens": (WHOLE, 1, math.inf),
    "data.workers": (WHOLE, 0, math.inf),
    "data.weights.narrative": (REAL, 0, math.inf),
    "data.weights.code": (REAL, 0, math.inf),
    "data.weights.structured": (REAL, 0, math.inf),
}


def validate(cfg: DictConfig, reference: DictConfig) -> None:
    """Check ``cfg`` and raise all problems together.

    Args:
        cfg: the composed config.
        reference: the same group choices without the user's and the experiment's values; its keys are the known ones.

    Raises:
        ValueError: one line per problem.
    """
    problems = []
    raw = OmegaConf.to_container(cfg, resolve=False)
    for key in flatten(raw):
        if _at(raw, key) == "???":
            problems.append(f"{key}: it has no value yet; set {key}=...")
    try:
        tree = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError("\n".join(problems) or str(error).splitlines()[0]) from error
    known = OmegaConf.to_container(reference, resolve=False)
    _keys(tree, known, "", flatten(known), problems)
    _targets(tree, "", problems)
    for key, rule in RANGES.items():
        _value(tree, key, *rule, problems)
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))


def _keys(tree: dict, known, prefix: str, all_known: list[str], problems: list[str]) -> None:
    if "_target_" in tree or not isinstance(known, dict):
        return  # arguments of a target are checked against its signature
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in known:
            if not (prefix[:-1] in MAPPINGS and isinstance(value, dict) and "_target_" in value):
                problems.append(f"{key}: no such setting.{did_you_mean(key, all_known)}")
        elif isinstance(value, dict):
            _keys(value, known[name], f"{key}.", all_known, problems)


def _targets(tree, key: str, problems: list[str]) -> None:
    if isinstance(tree, list):
        for index, value in enumerate(tree):
            _targets(value, f"{key}[{index}]", problems)
    if not isinstance(tree, dict):
        return
    if "_target_" in tree:
        try:
            target = locate(tree["_target_"])
        except ValueError as error:
            problems.append(f"{key}._target_: {error}")
        else:
            _arguments(target, tree, key, problems)
    for name, value in tree.items():
        _targets(value, f"{key}.{name}" if key else str(name), problems)


def locate(path: str):
    """Import what a ``_target_`` names, if it may be built from a config.

    That is a class or function of this package, or a class that torch, lightning or torchmetrics define themselves:
    ``torch.os.system`` and ``torch.load`` are neither.

    Raises:
        ValueError: it is not allowed, or does not exist.
    """
    room = str(path).partition(".")[0]
    if room not in ALLOWED or "." not in str(path):
        raise ValueError(f"{path} is not allowed; a target is under {', '.join(f'{name}.' for name in ALLOWED)}")
    target, rest = None, []
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            target, rest = importlib.import_module(".".join(parts[:end])), parts[end:]
            break
        except ModuleNotFoundError as error:
            if not ".".join(parts[:end]).startswith(error.name or ""):
                raise ValueError(f"{path} needs the package {error.name}, which is not installed") from error
    for name in rest:
        if not hasattr(target, name):
            names = [n for n in dir(target) if not n.startswith("_")]
            raise ValueError(f"{path} does not exist.{did_you_mean(name, names)}")
        target = getattr(target, name)
    home = str(getattr(target, "__module__", "")).partition(".")[0]
    homes = (room, "pytorch_lightning", "lightning_fabric") if room == "lightning" else (room,)
    if home not in homes or not (inspect.isclass(target) or (room == "megactx" and callable(target))):
        raise ValueError(f"{path} is not allowed; outside of megactx a target is a class")
    if inspect.isclass(target) and room != "megactx" and not issubclass(target, _kinds()):
        raise ValueError(f"{path} is not allowed; it is no part of a model, an optimiser, a trainer or its callbacks")
    return target


def _kinds() -> tuple[type, ...]:
    """What a config may build from other packages. Among the rest are classes that start processes."""
    import lightning
    import torch
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.profilers import Profiler
    from lightning.pytorch.strategies import Strategy
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    data = (lightning.LightningDataModule, lightning.Trainer)
    return (torch.nn.Module, Optimizer, LRScheduler, Callback, Logger, Profiler, Strategy, *data)


def _arguments(target, node: dict, key: str, problems: list[str]) -> None:
    parameters = inspect.signature(target).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    given = [str(name) for name in node if name not in HYDRA_WORDS]
    if not any(p.kind == p.VAR_KEYWORD for p in parameters):
        for name in given:
            if name not in names:
                meant = did_you_mean(name, names).replace("Did you mean ", f"Did you mean {key}.")
                problems.append(f"{key}.{name}: {node['_target_']} takes no such setting.{meant}")
    if not node.get("_partial_") and "_args_" not in node:
        required = [p.name for p in parameters if p.default is p.empty and p.name in names]
        for name in required:
            if name not in given:
                problems.append(f"{key}.{name}: {node['_target_']} needs it")


def _at(tree: dict, key: str):
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _value(tree: dict, key: str, kind, least: float, most: float, problems: list[str]) -> None:
    value = _at(tree, key)
    if value is None or value == "???":
        return
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
        what = "a whole number" if kind is WHOLE else "a number"
        span = f"from {least}" if most == math.inf else f"from {least} to {most}"
        problems.append(f"{key}={value}: allowed is {what} {span}")
