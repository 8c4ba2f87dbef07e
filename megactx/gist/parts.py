"""Finding poolings and heads by name: a new file in the folder is all it takes."""

import importlib
import pkgutil
from types import ModuleType


def names(package: ModuleType) -> list[str]:
    """The parts that a package offers: one per file."""
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def find(package: ModuleType, name: str, setting: str) -> type:
    """The class of part ``name``, called as its file but in CamelCase.

    Raises:
        ValueError: there is no such file; ``setting`` and the allowed names are in the message.
    """
    if name not in names(package):
        raise ValueError(f"{setting}={name} is not known, allowed are {', '.join(names(package))}")
    module = importlib.import_module(f"{package.__name__}.{name}")
    return next(value for key, value in vars(module).items() if key.lower() == name.replace("_", ""))
