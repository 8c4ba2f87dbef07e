"""A trained LensNet as a folder: ``lensnet.json`` says what it is and of which GistNet, the weights lie beside it."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from megactx.framework.files import replacing
from megactx.gist import GistNet

from .lensnet import LensNet

SETTINGS, WEIGHTS = "lensnet.json", "model.safetensors"


def save_lensnet(net: LensNet, settings: dict, gistnet: GistNet, folder: str | Path, made_by: str = "") -> None:
    """Write a LensNet into a folder, its matrices in bf16; one that is there is replaced once the new one is whole.

    Args:
        settings: what it was built from, keyword arguments of ``LensNet`` other than width and block size.
        gistnet: whose gists it was trained to judge.
        made_by: how it was trained, for people.
    """
    folder = Path(folder)
    about = {"settings": settings, "width": net.width, "block_size": net.block_size}
    about |= {"gistnet": identity(gistnet), "made_by": made_by}
    # tau and counters as they are: a rounded unit would move every score.
    weights = {k: v.to(torch.bfloat16) if v.ndim else v for k, v in net.state_dict().items()}
    with replacing(folder) as part:
        part.mkdir()
        (part / SETTINGS).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
        save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, part / WEIGHTS)


def load_lensnet(folder: str | Path, gistnet: GistNet) -> LensNet:
    """Read a LensNet for the GistNet that it was trained with, in eval mode, fp32.

    Raises:
        ValueError: there is none in the folder, its description is damaged, it is of another GistNet, or its weights do
            not fit.
    """
    folder = Path(folder)
    if not (folder / SETTINGS).is_file() or not (folder / WEIGHTS).is_file():
        raise ValueError(f"lensnet={folder}: there is no LensNet in it ({SETTINGS} and {WEIGHTS})")
    try:
        about = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        made_for = {name: about[name] for name in ("width", "block_size", "gistnet")}
        net = LensNet(about["width"], about["block_size"], **about["settings"])
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"lensnet={folder}: {SETTINGS} is damaged ({type(error).__name__}: {error})") from error
    for name in ("width", "block_size"):
        if made_for[name] != getattr(gistnet, name):
            raise ValueError(
                f"lensnet={folder}: its {name} is {made_for[name]}, the GistNet's {getattr(gistnet, name)}"
            )
    if made_for["gistnet"] != (own := identity(gistnet)):
        raise ValueError(f"lensnet={folder} was trained with another GistNet: {made_for['gistnet']}, this one is {own}")
    try:
        net.load_state_dict(load_file(folder / WEIGHTS))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"lensnet={folder}: its weights do not fit its settings ({error})") from error
    return net.float().eval().requires_grad_(False)


def identity(net: nn.Module) -> str:
    """Of its weights in bf16, in which they are saved: the same before and after."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        raw = tensor.detach().to(torch.bfloat16).cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()[:16]
