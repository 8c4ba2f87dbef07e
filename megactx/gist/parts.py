"""Finding poolings and heads by name: a new file in the folder is all it takes."""

import importlib
import pkgutil
from types import ModuleType


def names(package: ModuleType) -> list[str]:
    """The parts that a package offers: one per file."""
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def find(package: ModuleType, name: str, setting: str) -> type:
    """The class of part ``name``: its file's name in CamelCase.

    Raises:
        ValueError: there is no such file, or no class of that name in it; ``setting`` is in the message.
    """
    if name not in names(package):
        raise ValueError(f"{setting}={name} is not known, allowed are {', '.join(names(package))}")
    module = importlib.import_module(f"{package.__name__}.{name}")
    found = [value for key, value in vars(module).items() if key.lower() == name.replace("_", "")]
    if not found:
        camel = name.title().replace("_", "")
        raise ValueError(f"{setting}={name}: {module.__file__} has no class {camel}, called as the file in CamelCase")
    return found[0]
