"""What travels with the package: small models and their data cards. ``asset:NAME`` in a config names one."""

from pathlib import Path


def resolve(name: str | Path | None, setting: str = "base.name") -> str:
    """A model's folder as an absolute path, a name as given, the folder of an asset of the package for ``asset:NAME``.

    Args:
        name: as given by ``setting``, which an error names.

    Raises:
        ValueError: there is no asset of that name, a path leads to no folder, or there is no name.
    """
    if not name:
        raise ValueError(f"{setting} is not set: give a folder, or the name of a model on a hub")
    name = str(name)
    if not name.startswith("asset:"):
        folder = Path(name).expanduser()
        if folder.is_dir():
            return str(folder.absolute())
        if name.startswith(("/", ".", "~")) or name.count("/") > 1:  # a hub's names are `model` or `owner/model`
            raise ValueError(f"{setting}={name}: there is no such folder")
        return name
    here = Path(__file__).parent
    known = sorted(f"asset:{p.name}" for p in here.iterdir() if p.is_dir() and not p.name.startswith("_"))
    if name not in known:
        raise ValueError(f"{setting}={name}: there is no such asset; there is {', '.join(known) or 'none'}")
    return str(here / name.removeprefix("asset:"))
