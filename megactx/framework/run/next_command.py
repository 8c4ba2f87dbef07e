"""The command that comes next: what a run had is in it, so that it can be pasted as it is."""

import re
import shlex
from pathlib import Path

from omegaconf import OmegaConf

from ..config.config_docs import chosen
from ..errors import flatten
from .runfolder import HIDDEN

# What a run is about, whatever comes next; and the net, for what goes on from its weights.
ABOUT = ("base", "data", "preset", "trainer", "seed", "debug")
NET = ("gistnet", "pooling", "depth", "gaussian_rope", "compressor", "loss")
PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z_/.][\w./:@%+-]*", re.IGNORECASE)
STAGES_OWN = ("data.weights", "data.min_tokens", "data.max_tokens", "data.source")  # the next stage has its own


def setting(key: str, value) -> str:
    """``key=value`` as Hydra reads it again, whatever is in the value: a blank, a comma, a quote."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if value is None or isinstance(value, bool | int | float):
        return f"{key}={'null' if value is None else str(value).lower()}"
    text = str(value)
    return f"{key}={text if PLAIN.fullmatch(text) else QuotedString(text, Quote.single).with_quotes()}"


def experiment_of(folder: Path) -> str | None:
    """Which one a run is of; ``None`` where it does not say."""
    record = folder / "run.yaml"
    return OmegaConf.select(OmegaConf.load(record), "choices.experiment") if record.exists() else None


def next_command(
    folder: Path,
    experiment: str | None,
    changes: dict,
    keep: tuple = (*ABOUT, "block_size", *NET),
    options: tuple = (),
    program: str = "python train.py",
) -> str:
    """A command with the base, the data and the preset of the run in a folder, quoted for the shell.

    Args:
        experiment: to run; ``None``: the program has one.
        changes: setting -> value, what is new.
        keep: groups that are kept; of those that are not ``base`` or ``data``, what the command line said.
        options: groups of which the option alone is kept, for the numbers in them are those of another stage.
    """
    record = folder / "run.yaml"
    run = OmegaConf.to_container(OmegaConf.load(record)) if record.exists() else {}
    choices = run.get("choices") or {}
    default = chosen() | chosen(f"stage/{choices.get('stage')}")  # a stage takes some groups itself
    first = [] if experiment is None else [f"experiment={experiment}"]
    kept = {key: setting(key, value) for key, value in changes.items()}
    for group in (*keep, *options):
        if choices.get(group) not in (None, *default.get(group, [])):
            kept.setdefault(group, f"{group}={choices[group]}")
    for override in run.get("command", [])[2:]:
        key = override.lstrip("+").partition("=")[0]
        group = key.partition(".")[0]
        known = HIDDEN not in override and "=" in override and group in keep
        if known and key not in changes and (key != group or group in ("block_size", "loss", "seed")):
            kept[key] = override  # the last one counts
    for key, value in _set_elsewhere(folder, [*first, *kept.values()], keep).items():
        kept.setdefault(key, setting(key, value))
    return shlex.join([*program.split(), *first, *kept.values()])


def _set_elsewhere(folder: Path, overrides: list[str], keep) -> dict:
    """What the run's base and data are that these overrides do not give, for its experiment's own file has set it."""
    from ..config.search_path import compose

    if not (folder / "config.yaml").exists():
        return {}
    had = OmegaConf.load(folder / "config.yaml")
    try:
        gives = compose([override for override in overrides if not override.startswith("stage.")])
    except Exception:  # an experiment from a folder that is not looked into here
        return {}
    found = {}
    for group in [group for group in ("base", "data") if group in keep and group in had]:
        for key in flatten(OmegaConf.to_container(had[group]), f"{group}."):
            value = OmegaConf.select(had, key)
            known = not OmegaConf.is_config(value) and not key.startswith(STAGES_OWN) and value != HIDDEN
            if known and value != OmegaConf.select(gives, key, throw_on_missing=False):
                found[key] = value
    return found
