"""A trained GistNet as a folder: ``gistnet.json`` says what it is and of which base, the weights lie beside it."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megactx.framework.files import replacing
from megactx.lm import BaseLM
from megactx.lm.adapters import active_adapters
from megactx.lm.identity import of_embeddings, of_weights, raw

from .compressors import build
from .gistnet import GistNet

SETTINGS, WEIGHTS = "gistnet.json", "model.safetensors"


def save_gistnet(net: GistNet, settings: dict, base: BaseLM, folder: str | Path, made_by: str = "") -> None:
    """Write a GistNet into a folder, in bf16; one that is there is replaced once the new one is whole.

    Args:
        settings: what it was built from, keyword arguments of ``GistNet`` other than width and scale.
        base: the base LM that reads its gists.
        made_by: how it was trained, for people.
    """
    folder = Path(folder)
    about = {"settings": settings, "width": base.width, "base": of_embeddings(base), "weights": of_weights(base)}
    about |= {"made_by": made_by}
    with replacing(folder) as part:
        part.mkdir()
        (part / SETTINGS).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
        save_file({k: v.to(torch.bfloat16).cpu().contiguous() for k, v in net.state_dict().items()}, part / WEIGHTS)


def load_gistnet(folder: str | Path, base: BaseLM) -> GistNet:
    """Read a GistNet for the base LM that it was trained with, in eval mode, fp32.

    Raises:
        ValueError: there is none in the folder, it is of another base LM, or its weights do not fit.
    """
    folder = Path(folder)
    if not (folder / SETTINGS).is_file() or not (folder / WEIGHTS).is_file():
        raise ValueError(f"gistnet={folder}: there is no GistNet in it ({SETTINGS} and {WEIGHTS})")
    about = json.loads((folder / SETTINGS).read_text())
    other = "embeddings" if about["base"] not in (of_embeddings(base), _of_before(base)) else ""
    if not other and about.get("weights") not in (None, of_weights(base)):
        other = "layers"
    if other:
        raise ValueError(
            f"gistnet={folder} was trained with another base LM (width {about['width']}); this one, of width"
            f" {base.width}, has other {other}"
        )
    net = build(base, about["settings"], "gistnet")
    try:
        net.load_state_dict(load_file(folder / WEIGHTS))
    except RuntimeError as error:
        raise ValueError(f"gistnet={folder}: its weights do not fit its settings ({error})") from error
    return net.float().eval()


def _of_before(base: BaseLM) -> str | None:
    """What GistNets that were saved earlier say of a base LM; ``None`` where adapters change its embeddings."""
    embeddings = base.model.get_input_embeddings()
    if active_adapters(embeddings):
        return None
    return hashlib.sha256(raw(embeddings.weight.to(torch.bfloat16)).tobytes()).hexdigest()[:16]
