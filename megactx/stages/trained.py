"""What other stages start from: a trained GistNet, wherever it is."""

import json
from pathlib import Path

from megactx.assets import resolve
from megactx.framework.resume import read_best, refuse_other_base
from megactx.gist import GistNet
from megactx.gist.compressors import build
from megactx.gist.pretrained import SETTINGS, load_gistnet
from megactx.lm import BaseLM
from megactx.lm.identity import record_of

PREFIXES = ("nets.gistnet.", "gistnet.")  # in checkpoints of a gist stage, and of those that start from a GistNet


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
