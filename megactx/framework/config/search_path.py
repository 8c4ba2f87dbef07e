"""Where the configs are: ``configs`` holds the parts, ``conf`` the experiments. Registered here, once, for everybody.

``hydra.searchpath`` would break ``-m 'experiment=glob(*)'`` and depend on the working directory; a plugin does not.
"""

import hashlib
import re
import warnings

from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .config_docs import listing, root

VERSION_BASE = "1.3"


class ExperimentsSearchPath(SearchPathPlugin):
    """Adds ``conf`` behind the primary root."""

    def manipulate_search_path(self, search_path) -> None:
        search_path.append("megactx", f"file://{root('conf')}")


def register() -> None:
    """Make the second root and the resolvers of the configs known to Hydra. Safe to call again."""
    if ExperimentsSearchPath not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(ExperimentsSearchPath)
    from ..sweep import grids  # only now: looking for plugins, Hydra loads the sweeper that it is made of once more

    grids.register()
    # Our launchers' files have the names of the plugins' own, on purpose: the values in them suit training.
    warnings.filterwarnings("ignore", r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")
    OmegaConf.register_new_resolver("times", lambda a, b: None if a is None else a * b, replace=True)
    OmegaConf.register_new_resolver("plus", lambda *values: sum(values), replace=True)
    OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
    OmegaConf.register_new_resolver("folder_name", _folder_name, replace=True)
    OmegaConf.register_new_resolver("listing", listing, replace=True)


def compose(overrides=(), with_hydra: bool = False) -> DictConfig:
    """Compose a config as ``train.py`` would, for tests and notebooks: ``compose(["experiment=base_lm"])``.

    Args:
        overrides: as on the command line.
        with_hydra: keep the ``hydra`` node.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    register()
    asked = dict(config_name="config", overrides=list(overrides), return_hydra_config=with_hydra)
    if GlobalHydra.instance().is_initialized():  # within a job: its search path, with what --config-dir added
        return hydra.compose(**asked)
    with hydra.initialize_config_dir(str(root("configs")), version_base=VERSION_BASE):
        return hydra.compose(**asked)


def option(group: str, text: str) -> dict:
    """An option of a group that is no part of a training run, for commands: ``NAME,setting=value,...`` -> its settings.

    Raises:
        ValueError: there is no such option or setting, or a value cannot be read.
    """
    from hydra.errors import HydraException

    from ..errors import composition_message

    name, *given = text.split(",")
    overrides = [f"+{group}={name}", *(f"{group}.{pair}" for pair in given)]
    try:
        return OmegaConf.to_container(compose(overrides)[group], resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(composition_message(error, overrides)) from error


def reference(choices, cfg: DictConfig) -> DictConfig:
    """The chosen parts without the values of the experiment and of the command line.

    Args:
        choices: group -> option, as Hydra keeps them: groups of which several are chosen are not among them.
        cfg: the composed config, in which those are.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    if not GlobalHydra.instance().is_initialized():  # in no job
        with hydra.initialize_config_dir(str(root("configs")), version_base=VERSION_BASE):
            return reference(choices, cfg)
    groups = {g: c for g, c in choices.items() if not g.startswith("hydra/") and g != "experiment" and c is not None}
    known = GlobalHydra.instance().config_loader().get_group_options("loss")
    losses = ",".join(name for name in cfg.get("loss") or {} if name in known)
    # An option put at a place of the user's own is in no defaults list.
    chosen = (f"{'+' * ('@' in group)}{group}={choice}" for group, choice in groups.items())
    return compose([*chosen, f"loss=[{losses}]"])


def _run_name() -> str:
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return "run"
    choices = HydraConfig.get().runtime.choices
    return str(choices.get("experiment") or choices.get("stage") or "run").replace("/", "_")


def _folder_name(overrides: str, task=(), excluded=()) -> str:
    """The overrides of a sweep's job as one folder name of bounded length, another one for each job.

    Args:
        overrides: as Hydra writes them in a row: what separates them, and a key from its value, may be in a value too.
        task: the overrides themselves.
        excluded: keys that do not count, such as ``resume``.
    """
    given = [one for one in task if one.lstrip("+~").partition("=")[0] not in excluded]
    name = re.sub(r"[/\s\x00]", lambda match: "_" * (match[0] == "/"), overrides) or "defaults"
    values = [override.partition("=")[2] for override in given]
    unlike = name != (overrides or name) or any("=" in value or "__" in value for value in values)
    if unlike or len(name.encode()) > 120:
        full = "\0".join(sorted(given)) if unlike else name
        short = name.encode()[:100].decode(errors="ignore")
        name = f"{short}_{hashlib.sha256(full.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
    return name


register()
