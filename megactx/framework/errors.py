"""Errors as a person should read them, and their exit codes.

0 done, 2 a user's mistake, 3 a run that failed on its own, 130 interrupted.
"""

import difflib
import errno
import re

DONE, MISTAKE, FAILED, INTERRUPTED = 0, 2, 3, 130
LOST = ("DistBackendError", "DistNetworkError", "DistStoreError")  # of torch.distributed; gloo has none of its own
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk
# Settings of the release before -> where they are now.
RENAMED = {f"stage.history.{name}": f"loss.history.{name}" for name in ("segments", "segment", "recency")} | {
    "stage.history.weight": "loss.history.weight, and loss.block.weight has what is left of 1",
    "stage.history.recall": "loss.recall.weight",
    "stage.level2_weight": "loss.level2.weight",
    "stage.seam_weight": "loss.block.seam_weight",
    "stage.objective": "loss.block.objective",
}


class RunFailed(Exception):
    """A run that cannot go on through no mistake in its settings' form: a NaN loss, a full disk."""


class Interrupted(Exception):
    """Ctrl-C, after the step that was under way. Not a KeyboardInterrupt: Lightning would exit by itself."""


def closest(name: str, known) -> list[str]:
    """The known settings that a misspelt one may have meant, the likeliest first, three at most."""
    known = [k for k in dict.fromkeys(known) if k != name]
    parent, _, leaf = name.rpartition(".")
    beside = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    if near := difflib.get_close_matches(leaf, beside, n=1, cutoff=0.6):
        return [beside[near[0]]]
    same_leaf = [k for k in known if k.split(".")[-1] == leaf]
    return (same_leaf or difflib.get_close_matches(name, known, n=3, cutoff=0.75))[:3]


def did_you_mean(name: str, known) -> str:
    """`` Did you mean ...?``, or nothing where nothing is close."""
    found = closest(name, known)
    return f" Did you mean {' or '.join(found)}?" if found else ""


def verdict(error: BaseException) -> tuple[int, str]:
    """Exit code and message of an error in building or running."""
    while type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        error = error.__cause__  # Hydra wraps what a constructor raises
    text = str(error).strip() or type(error).__name__
    if isinstance(error, RunFailed):
        return FAILED, text
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return FAILED, (
            "out of memory. Make preset.batch smaller (preset.accumulate makes up for it), or preset.spans, or"
            f" preset.max_tokens ({text.splitlines()[0]})"
        )
    if type(error).__name__ in LOST or isinstance(error, RuntimeError) and "gloo" in text:
        return FAILED, (
            "another process of this run has gone, or its host cannot be reached. What was saved last is whole: start"
            f" all of them again with resume=auto ({text.splitlines()[0][:200]})"
        )
    if isinstance(error, OSError) and error.errno in FULL:
        return FAILED, f"the disk is full or a file may not grow: set folder=... to a place with room ({text})"
    if type(error).__module__.startswith("wandb.") and type(error).__name__ in ("UsageError", "AuthenticationError"):
        return MISTAKE, f"logger=wandb: {text}. logger.wandb.offline=true needs no account; `wandb login` sets a key"
    if isinstance(error, ValueError) or type(error).__name__ == "MisconfigurationException":
        return MISTAKE, text
    return FAILED, f"the run failed: {type(error).__name__}: {text}"


def composition_message(error: Exception, overrides: list[str]) -> str:
    """What Hydra could not compose, in one line, with what may have been meant."""
    text = str(error).strip()
    if options := getattr(error, "options", None):
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        meant = did_you_mean(option, options).replace("Did you mean ", f"Did you mean {group}=")
        return f"{group}={option}: no such option.{meant} There is {', '.join(options)}."
    if "hydra_plugins." in text and ("Unknown plugin" in text or "Could not instantiate plugin" in text):
        return f"a Hydra plugin is not installed: pip install 'megactx[sweep,optuna]' ({text.splitlines()[0]})"
    if "group override must be a string" in text:
        wrong = next((o for o in overrides if _is_group(o) and not re.match(r"[A-Za-z_]", o.partition("=")[2])), "")
        options = _options(wrong.partition("=")[0])
        return f"{wrong}: an option's name starts with a letter. There is {', '.join(options)}."
    if match := re.match(r"Ambiguous value for argument '(.*)'$", text.partition("\n")[0]):
        key, _, value = match[1].partition("=")
        return (
            f"{match[1]}: a comma stands between the values of a sweep, which -m starts; for one value with a comma"
            f""" quote it twice: '{key}="{value}"'; for a list write '{key}=[{value}]'"""
        )
    if wrong := getattr(error, "override", None):
        return (
            f"{wrong}: it cannot be read ({text.splitlines()[0]}); quote it for the shell, and for Hydra where needed"
        )
    if match := re.match(r"(?:In '.*': )?Could not (?:override|delete|append to).*?'~?([^']+)'", text, re.DOTALL):
        known = known_keys(overrides)
        if match[1] in RENAMED and "stage.losses" in known:  # LensNet's stage had an objective too
            return f"{match[1]}: it is now {RENAMED[match[1]]}"
        inner = re.search(r"full_key: (\S+)", _last(error))
        return _unknown(inner[1] if inner else match[1], known)
    if match := re.search(r"Interpolation key '([^']+)' not found", _last(error)):
        return f"{match[1]}: a setting that others refer to is gone ({_last(error).splitlines()[0]})"
    if store := next((o for o in overrides if o.lstrip("+").startswith("hydra.sweeper.storage=")), ""):
        missing = _last(error).startswith("No module named") and not re.search("sqlalchemy|alembic", _last(error))
        if not store.endswith("=null") and not missing:
            return (
                f"{store}: a store of the sweeper cannot be used, it needs SQLAlchemy below 2; leave it out: a second"
                f" start goes on by the folders of its jobs ({type(error).__name__})"
            )
    first = text.splitlines()[0] if text else type(error).__name__
    last = _last(error).splitlines()[0]
    return first if last in first else f"{first} ({last})"


def _unknown(key: str, known: list[str]) -> str:
    meant = did_you_mean(key, known)
    if not meant and f"{key.rpartition('.')[0]}._target_" in known:
        meant = f" Another argument of what {key.rpartition('.')[0]} builds is added as +{key}=..."
    return f"{key}: no such setting.{meant}"


def innermost(error: BaseException) -> BaseException:
    """What an error came of first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _last(error: BaseException) -> str:
    return str(innermost(error)).strip() or type(innermost(error)).__name__


def known_keys(overrides: list[str] = ()) -> list[str]:
    """All settings and groups of the composed config, with the group choices of ``overrides`` where they compose."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    from .config.search_path import compose

    for attempt in ([o for o in overrides if _is_group(o) and "," not in o], []):
        try:
            cfg = compose(attempt)
        except (HydraException, ValueError):
            continue
        return _groups() + flatten(OmegaConf.to_container(cfg, resolve=False))
    return []


def flatten(tree: dict, prefix: str = "") -> list[str]:
    """Dotted keys of a nested dict, inner ones included."""
    keys = []
    for name, value in tree.items():
        keys.append(f"{prefix}{name}")
        if isinstance(value, dict):
            keys += flatten(value, f"{prefix}{name}.")
    return keys


def _groups() -> list[str]:
    from .config.search_path import root

    return sorted(p.name for name in ("configs", "conf") for p in root(name).iterdir() if p.is_dir())


def _options(group: str) -> list[str]:
    from .config.search_path import root

    return sorted(p.stem for name in ("configs", "conf") for p in (root(name) / group).glob("*.yaml"))


def _is_group(override: str) -> bool:
    return override.partition("=")[0].lstrip("+") in _groups()
