"""What other stages start from: a trained GistNet, wherever it is."""

import json
import logging
from pathlib import Path

from megactx.assets import resolve
from megactx.framework.resume import other_base, read_best
from megactx.gist import GistNet
from megactx.gist.compressors import build
from megactx.gist.pretrained import SETTINGS, load_gistnet
from megactx.lm import BaseLM
from megactx.lm.identity import of_embeddings, of_weights
from megactx.runtime.settings import note_on

log = logging.getLogger(__name__)

PREFIXES = ("nets.gistnet.", "gistnet.")  # in checkpoints of a gist stage, and of those that start from a GistNet


def record_of(base: BaseLM, name: str) -> dict:
    """What checkpoints say of the base LM that they are trained with: its name, its identity as trees have it, and that
    of its layers."""
    return {"name": str(name), "width": base.width, "embeddings": of_embeddings(base), "weights": of_weights(base)}


def tell_of_sessions(base: BaseLM, block_size: int) -> None:
    """Say before training, not behind it, what sessions with this base LM can do where it takes few positions."""
    if note := note_on(block_size, base.max_positions):
        log.warning("Sessions of what is trained here: %s", note)


STATES = ("state_dict", "current_model_state")  # the second where weights are averaged: those that go on training


def leave_out_base(checkpoint: dict, kept=frozenset()) -> None:
    """A frozen base is named in the hyperparameters; its weights do not belong into every checkpoint.

    Args:
        kept: names of its tensors that do, for they are trained.
    """
    for states in set(STATES) & checkpoint.keys():
        found = checkpoint[states].items()
        checkpoint[states] = {k: v for k, v in found if not k.startswith("base.") or k in kept}


def put_base_back(checkpoint: dict, base: BaseLM) -> None:
    """What ``leave_out_base`` has left out."""
    own = {f"base.{k}": v for k, v in base.state_dict().items()}
    for states in set(STATES) & checkpoint.keys():
        checkpoint[states] = {**own, **checkpoint[states]}


def refuse_other_base(checkpoint: dict, mine: dict, what: str = "") -> None:
    """A checkpoint that was trained with another base LM is worth nothing with this one.

    Args:
        mine: ``record_of`` this one.
        what: what was asked for, for the message.

    Raises:
        ValueError: it was.
    """
    if changed := other_base(checkpoint, mine):
        raise ValueError(f"{what}{changed}")


def gistnet_of(path: str, base: BaseLM) -> GistNet:
    """A GistNet in eval mode.

    Args:
        path: ``asset:NAME``, a folder of ``save_gistnet``, a run folder of a stage that has a GistNet (the best
            checkpoint counts), or a checkpoint.

    Raises:
        ValueError: there is none, it is of another compressor, or of another base.
    """
    folder = folder_of(path, "gistnet")
    if (folder / SETTINGS).exists():
        return load_gistnet(folder, base)
    checkpoint = read_best(folder, "gistnet")
    refuse_other_base(checkpoint, record_of(base, "of this run"), f"gistnet={path}: ")
    found = checkpoint["state_dict"]
    weights = {k.removeprefix(prefix): v for prefix in PREFIXES for k, v in found.items() if k.startswith(prefix)}
    if not weights:
        raise ValueError(f"gistnet={path}: no GistNet was trained there")
    net = build(base, gistnet_settings(path), "gistnet")
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"gistnet={path}: its weights do not fit this base LM ({error})") from error
    return net.eval()


def gistnet_settings(path: str) -> dict:
    """What the GistNet of ``gistnet_of`` was built from: keyword arguments of ``GistNet``.

    Raises:
        ValueError: there is no such folder or checkpoint.
    """
    folder = folder_of(path, "gistnet")
    if (folder / SETTINGS).exists():
        return json.loads((folder / SETTINGS).read_text())["settings"]
    given = read_best(folder, "gistnet")["hyper_parameters"].get("gistnet")
    if given is None:
        raise ValueError(f"gistnet={path}: no GistNet was trained there")
    return given if isinstance(given, dict) else gistnet_settings(given)  # it started from another one's


def folder_of(path: str, setting: str) -> Path:
    """Where an asset, a run or a checkpoint lies; ``setting`` names it in the message.

    Raises:
        ValueError: nowhere.
    """
    folder = Path(resolve(path) if str(path).startswith("asset:") else path).expanduser()
    if not folder.exists():
        raise ValueError(f"{setting}={path}: there is no such folder or checkpoint")
    return folder
