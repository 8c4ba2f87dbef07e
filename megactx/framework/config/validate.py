"""Checks a composed config before anything is built: all problems at once, each with what may have been meant.

Hydra catches ``gistnet.haed=mlp`` by itself, but ``+gistnet.haed=mlp``, ``+lrr=1`` and whatever an experiment file
misspells pass it silently. So every key must be known to the parts, or be an argument of its ``_target_``.
"""

import importlib
import inspect
import re
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import did_you_mean, flatten
from ..files import matches
from .types import Count, NonNegative, Seed, Whole, hints, like, word
from .types import problems as wrong_values

ALLOWED = ("megactx", "torch", "lightning", "torchmetrics")
MAPPINGS = ("callbacks", "logger")  # name -> {_target_}: names are free
NAMES_ARE_FREE = ("stage.config", "stage.controls", "stage.targets")  # arguments whose keys nobody here knows
RESERVED = {  # arguments of the Trainer that are set from elsewhere, and would silently say nothing
    "trainer.callbacks": "the group callbacks",
    "trainer.logger": "the group logger",
    "trainer.enable_progress_bar": "callbacks.progress",
    "trainer.enable_checkpointing": "callbacks.checkpoint",
    "trainer.plugins": "the program itself",
}
OWN_WORDS = ("trainer.accelerator", "trainer.precision", "trainer.devices", "trainer.strategy")  # "auto" and more
HYDRA_WORDS = {"_target_", "_recursive_", "_convert_"}

MISSING = object()
# What no argument of this package takes, so no annotation says what it may be.
RULES = {
    "seed": Seed,
    "block_size": Count,
    "megacontext": Literal["focus", "none"],
    "preset.steps": Count,
    "preset.accumulate": Count,
    "preset.validate_every": Count,
    "preset.minutes": Annotated[float, Ge(0.1)] | None,
    "horizon.tokens": Count,
    "trainer.gradient_clip_val": NonNegative | None,
    "trainer.log_every_n_steps": Whole,
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
    raw, known = (OmegaConf.to_container(config, resolve=False) for config in (cfg, reference))
    if gone := [name for name in known if name not in raw and name not in MAPPINGS]:  # others refer to it
        raise ValueError("\n".join(f"{name}: it is gone, and every run needs it; leave ~{name} out" for name in gone))
    for key in flatten(raw):
        if _at(raw, key) == "???":
            problems.append(f"{key}: it has no value yet; set {key}=...")
    try:
        tree = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError("\n".join(problems) or str(error).splitlines()[0]) from error
    problems += [f"{name}: it is gone; {name}=none leaves it out" for name in MAPPINGS if name not in raw]
    wrong: list[str] = []
    for key, rule in RULES.items():
        if (value := _at(tree, key)) not in (MISSING, "???"):
            wrong += wrong_values(value, rule, key)
    _targets(tree, raw, "", wrong)
    first = {}
    for line in wrong:
        moved = _where_it_is_set(line, raw)
        if moved == line or "=null: " not in line:  # what was to be set elsewhere: who needs it says how to give it
            first.setdefault(moved.partition("=")[0], moved)  # several arguments may take one setting
    wrong = list(first.values())
    _keys(raw, known, "", flatten(known), problems, reference, {line.partition("=")[0] for line in wrong})
    problems += wrong
    _special(tree, problems)
    _lengths(tree, problems)
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))


def refuse_idle(overrides: list[str], choices: dict) -> None:
    """Settings that would change nothing: of another compressor than the chosen one, minutes beside steps.

    Args:
        overrides: of the command line.
        choices: group -> option.

    Raises:
        ValueError: naming them.
    """
    values = dict(override.lstrip("+").partition("=")[::2] for override in overrides)
    steps = next((key for key in ("preset.steps", "trainer.max_steps") if key in values), None)
    if steps and values.get("preset.minutes", "null") != "null":
        raise ValueError(f"preset.minutes={values['preset.minutes']} and {steps} are not allowed together")
    compressor = choices.get("compressor", "gistnet")
    given = [override.lstrip("+~").partition("=")[0] for override in overrides]
    idle = [key for key in given if key.partition(".")[0] in ("gistnet", "pooling", "depth", "gaussian_rope")]
    if compressor != "gistnet" and idle:
        raise ValueError(f"{', '.join(idle)}: it is for compressor=gistnet, but compressor={compressor} is set")


def _where_it_is_set(line: str, raw: dict) -> str:
    """A problem under the name of the setting that a value comes from: ``stage.max_steps=0`` is ``preset.steps=0``."""
    key, sign, rest = line.partition("=")
    return _source(key, raw) + sign + rest if sign else line


def _source(key: str, raw: dict) -> str:
    node, names = raw, key.split(".")
    for index, name in enumerate(names):
        node = node.get(name) if isinstance(node, dict) else None
        if isinstance(node, str) and (other := re.fullmatch(r"\$\{([\w.]+)\}", node)):
            return _source(".".join([other[1], *names[index + 1 :]]), raw)
    return key


def _keys(
    tree: dict, known, prefix: str, all_known, problems: list[str], reference: DictConfig, told: set[str]
) -> None:
    """Unknown keys, and values of another kind than those that they replace; both trees are not resolved."""
    built = "_target_" in tree  # its own arguments are checked against its signature
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in known:
            named = prefix[:-1] in MAPPINGS and (value is None or isinstance(value, dict) and "_target_" in value)
            if not built and not named:
                problems.append(f"{key}: no such setting.{did_you_mean(key, all_known)}")
            continue
        old = known[name]
        if isinstance(value, str) and not value.strip() and old != value:
            problems.append(f"{key}={value}: it is empty; set it, or leave it out")
            continue
        if isinstance(value, dict) and _refers(old) and OmegaConf.is_dict(found := OmegaConf.select(reference, key)):
            old = OmegaConf.to_container(found, resolve=False)
        if isinstance(value, dict) and isinstance(old, dict):
            if key not in NAMES_ARE_FREE:
                _keys(value, old, f"{key}.", all_known, problems, reference, told)
        elif not (built or key in told or prefix[:-1] in MAPPINGS or _refers(value) or _refers(old)):
            if not like(value, old):
                example = f", such as {old}" if not isinstance(old, dict | list) else ""
                problems.append(f"{key}={value}: allowed is {word(old)}{example}")


def _refers(value) -> bool:
    """Whether a value stands for another one, or for none yet: it is judged where it is set."""
    return isinstance(value, str) and ("${" in value or value == "???")


def _targets(tree, raw, key: str, problems: list[str]) -> None:
    """Targets that may not be built or do not exist, and their arguments. ``raw`` is the tree as it was written."""
    if isinstance(tree, list):
        for index, value in enumerate(tree):
            same = isinstance(raw, list) and index < len(raw)
            _targets(value, raw[index] if same else None, f"{key}[{index}]", problems)
    if not isinstance(tree, dict) or _refers(raw):
        return
    raw = raw if isinstance(raw, dict) else {}
    if "_target_" in tree:
        try:
            target = locate(tree["_target_"])
        except ValueError as error:
            problems.append(f"{key}._target_: {error}")
        else:
            if kind := _misplaced(target, key):
                problems.append(f"{key}._target_: {tree['_target_']} is no {kind}")
            else:
                _arguments(target, tree, raw, key, problems)
    for name, value in tree.items():
        _targets(value, raw.get(name), f"{key}.{name}" if key else str(name), problems)


def _misplaced(target, key: str) -> str:
    """The kind of object that a place asks for, where the target is none."""
    group, _, name = key.partition(".")
    place = f"{group}.*" if group in MAPPINGS and name and "." not in name else key
    kind = _kinds().get(place, object)
    return "" if kind is object or inspect.isclass(target) and issubclass(target, kind) else kind.__name__


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
    if inspect.isclass(target) and room != "megactx" and not issubclass(target, tuple(_kinds().values())):
        raise ValueError(f"{path} is not allowed; it is no part of a model, an optimiser, a trainer or its callbacks")
    return target


def _kinds() -> dict[str, type]:
    """What a config may build from other packages, by its place. Among the rest are classes that start processes."""
    import lightning
    import torch
    from lightning.pytorch import loggers, profilers, strategies

    found = {"trainer": lightning.Trainer, "trainer.profiler": profilers.Profiler, "logger.*": loggers.Logger}
    found |= {"datamodule": lightning.LightningDataModule, "callbacks.*": lightning.Callback}
    found |= {"a module": torch.nn.Module, "an optimizer": torch.optim.Optimizer, "a strategy": strategies.Strategy}
    return found | {"a schedule": torch.optim.lr_scheduler.LRScheduler}


def _arguments(target, node: dict, raw: dict, key: str, problems: list[str]) -> None:
    parameters = _parameters(target)
    names = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    given = [str(name) for name in node if name not in HYDRA_WORDS]
    if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        for name in given:
            if name not in names:
                meant = did_you_mean(name, names).replace("Did you mean ", f"Did you mean {key}.")
                problems.append(f"{key}.{name}: {node['_target_']} takes no such setting.{meant}")
    for name in names:
        if parameters[name].default is inspect.Parameter.empty and name not in given:
            problems.append(f"{key}.{name}: {node['_target_']} needs it")
    annotations = hints(target)
    for name in (name for name in names if name in given and name in annotations):
        where, value = f"{key}.{name}", node[name]
        built = isinstance(value, dict) and "_target_" in value  # becomes something else
        if not built and where not in OWN_WORDS and value not in ("???", parameters[name].default):
            problems += wrong_values(value, annotations[name], where)


def _parameters(target) -> dict[str, inspect.Parameter]:
    """Of a class of this package that hands ``**settings`` on, those of its parent too."""
    found = dict(inspect.signature(target).parameters)
    rest = [name for name, p in found.items() if p.kind == p.VAR_KEYWORD]
    if rest and inspect.isclass(target) and target.__module__.startswith("megactx."):
        del found[rest[0]]
        found = _parameters(target.__mro__[1]) | found
    return found


def _special(tree: dict, problems: list[str]) -> None:
    """What no signature tells."""
    for key, instead in RESERVED.items():
        if _at(tree, key) is not MISSING:
            problems.append(f"{key}: it says nothing here; {instead} decides")
    problems += [f"{key}=null: it needs a value" for key in ("name", "folder") if tree.get(key, "") is None]
    for group in MAPPINGS:
        for name, node in (tree.get(group) or {}).items():
            if node is not None and not (isinstance(node, dict) and "_target_" in node):
                problems.append(f"{group}.{name}={node}: allowed is a mapping with a _target_, or null to leave it out")
    controls, known = _at(tree, "stage.controls"), tree.get("gistnet")
    for name, settings in controls.items() if isinstance(controls, dict) and isinstance(known, dict) else ():
        if not isinstance(settings, dict | None):
            problems.append(f"stage.controls.{name}={settings}: allowed is a mapping, or null to leave it out")
            continue
        if "name" in (settings or {}):  # no GistNet: what it takes is known when it is built
            continue
        for setting in [setting for setting in settings or {} if setting not in (*known, "lr")]:
            meant = did_you_mean(setting, known)
            problems.append(f"stage.controls.{name}.{setting}: a GistNet has no such setting.{meant}")
    if tree.get("megacontext") == "none":
        _stock(tree, problems)
    path = _at(tree, "stage.evaluate.path")  # read only after the training
    here = Path(path).expanduser() if isinstance(path, str) else None
    if here is not None and not here.exists() and not matches(here):
        problems.append(f"stage.evaluate.path={path}: no such file or folder, and no file matches it as a glob")


def _stock(tree: dict, problems: list[str]) -> None:
    """What a stock model has nothing of."""
    try:
        stage = locate(_at(tree, "stage._target_"))
    except ValueError:  # told already
        return
    if not tree.get("curriculum") and not stage.stock:
        problems.append(f"megacontext=none: {stage.__name__} trains or reads gists, which a stock model has none of")
    if _at(tree, "stage.gists") not in (MISSING, 0):
        problems.append(f"stage.gists={_at(tree, 'stage.gists')}: allowed with megacontext=none is 0")


def _lengths(tree: dict, problems: list[str]) -> None:
    """Numbers of steps that contradict each other: each would be taken, and the run would be another than it says."""

    def number(key: str) -> int | None:
        value = _at(tree, key)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    if not isinstance(tree.get("datamodule"), dict):  # it trains in no steps
        return
    schedule, most = number("stage.max_steps"), number("trainer.max_steps")
    steps, every, warmup = schedule or number("preset.steps"), number("preset.validate_every"), number("stage.warmup")
    if _at(tree, "trainer.max_steps") is MISSING:
        problems.append("trainer.max_steps: it is gone, and the run would never end; leave ~trainer.max_steps out")
    if schedule and most and schedule != most:
        problems.append(
            f"trainer.max_steps={most}: the learning rate's schedule runs over {schedule} steps; set preset.steps,"
            " which is for both"
        )
    every_batches = every and every * (number("preset.accumulate") or 1)
    for key, value, instead in (
        ("accumulate_grad_batches", number("preset.accumulate"), "accumulate"),
        ("val_check_interval", every_batches, "validate_every"),
    ):
        given = number(f"trainer.{key}")
        if value and given and given != value:
            problems.append(
                f"trainer.{key}={given}: data, schedule and pace count with {value} batches; set preset.{instead},"
                " which is for all of them"
            )
    # With a debug option nobody asks for the best of the run, nor whether the learning rate gets to its peak.
    looked_at = HydraConfig.initialized() and HydraConfig.get().runtime.choices.get("debug")
    if steps and every and every > steps and _at(tree, "trainer.limit_val_batches") != 0 and not looked_at:
        problems.append(
            f"preset.validate_every={every} is beyond preset.steps={steps}, so there would be no validation and no best"
            f" checkpoint: {steps} or less"
        )
    parts = {"preset.steps": steps}
    cycles, phases = number("stage.cycles"), _at(tree, "stage.steps")
    if cycles and isinstance(phases, dict):  # each part warms up over its own steps
        parts = {
            f"stage.cycles x stage.steps.{n}": cycles * v for n, v in phases.items() if isinstance(v, int) and v > 0
        }
    for name, length in parts.items():
        if warmup and length and warmup > length and not looked_at:
            problems.append(
                f"preset.warmup={warmup} is beyond {name}={length}, so the learning rate would never reach its peak:"
                f" {length} or less"
            )


def _at(tree: dict, key: str):
    for name in key.split("."):
        tree = tree.get(name, MISSING) if isinstance(tree, dict) else MISSING
    return tree
