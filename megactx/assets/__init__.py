"""What travels with the package: small models and their data cards. ``asset:NAME`` in a config names one."""

from pathlib import Path


def resolve(name: str | Path) -> str:
    """A model name or folder as given, or the folder of an asset of the package for ``asset:NAME``.

    Raises:
        ValueError: there is no asset of that name.
    """
    name = str(name)
    if not name.startswith("asset:"):
        return name
    here = Path(__file__).parent
    known = sorted(f"asset:{p.name}" for p in here.iterdir() if p.is_dir() and not p.name.startswith("_"))
    if name not in known:
        raise ValueError(f"base.name={name}: there is no such asset; there is {', '.join(known) or 'none'}")
    return str(here / name.removeprefix("asset:"))
