"""Where a trained part is, what a checkpoint holds of it, and whether it was trained with another base LM."""

from pathlib import Path

from megactx.assets import resolve
from megactx.framework.run.resume import best, read

# The files of a part's folder.
GISTNET, LENSNET, KEYS, PREDICTION = (f"{part}.json" for part in ("gistnet", "lensnet", "keys", "prediction"))
WEIGHTS = "model.safetensors"


def find(path: str | Path, part: str, setting: str) -> Path:
    """The folder of a part, or the run folder or checkpoint that has it.

    Args:
        path: see ``megactx.parts``.
        part: ``gistnet`` or ``lensnet``.
        setting: what has named the path, for messages.

    Raises:
        ValueError: there is nothing.
    """
    place = Path(resolve(path, setting) if str(path).startswith("asset:") else path).expanduser()
    if not place.exists():
        raise ValueError(f"{setting}={path}: there is no such folder or checkpoint")
    exported = place / part
    return exported if (exported / f"{part}.json").is_file() else place


def read_best(path: Path, setting: str) -> dict:
    """The content of a checkpoint, or of the best one of a run folder; ``setting`` is what has named it, for messages.

    Raises:
        ValueError: there is none, or it is no checkpoint.
    """
    if not path.exists():
        raise ValueError(f"{setting}={path}: there is no such checkpoint or run folder")
    try:
        path = best(path) if path.is_dir() else path
    except ValueError as error:
        raise ValueError(f"{setting}={error}") from error
    return read(path, setting)


def under(checkpoint: dict, *prefixes: str) -> dict:
    """Tensors of a checkpoint whose names begin with one of the prefixes, without it."""
    found = checkpoint["state_dict"]
    return {k.removeprefix(prefix): v for prefix in prefixes for k, v in found.items() if k.startswith(prefix)}


def other_base(checkpoint: dict, mine: dict) -> str:
    """How the base LM that a checkpoint was trained with differs from this one, in words, its name and width first.

    Empty where it does not, or where a checkpoint of earlier days does not say.

    Args:
        mine: ``record_of`` this one, as a stage keeps it in checkpoints; one of earlier days has no ``weights``.
    """
    there = checkpoint.get("base") or {}
    changed = next(
        (key for key in ("width", "embeddings", "weights") if key in there and there[key] != mine[key]), None
    )
    if changed is None:
        return ""
    return (
        f"it was trained with another base LM: {there['name']} of width {there['width']}, this one is {mine['name']} of"
        f" width {mine['width']}{', with other ' * (changed != 'width')}"
        f"{dict(width='', embeddings='embeddings', weights='layers')[changed]}"
    )


def refuse_other_base(checkpoint: dict, mine: dict, what: str = "") -> None:
    """A checkpoint that was trained with another base LM is worth nothing with this one.

    Args:
        mine: of this one, see ``other_base``.
        what: what was asked for, for the message.

    Raises:
        ValueError: it was.
    """
    if changed := other_base(checkpoint, mine):
        raise ValueError(f"{what}{changed}")
