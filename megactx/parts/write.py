"""Trained parts as folders: a description in JSON, the weights beside it."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megactx.focus.lensnet import LensNet
from megactx.framework.files import replacing
from megactx.gist import GistNet
from megactx.lm import BaseLM
from megactx.lm.identity import of_embeddings, of_net, of_weights

from .find import WEIGHTS


def save_gistnet(net: GistNet, settings: dict, base: BaseLM, folder: str | Path, made_by: str = "") -> None:
    """Write a GistNet into a folder, in bf16; one that is there is replaced once the new one is whole.

    Args:
        settings: what it was built from, keyword arguments of ``GistNet`` other than width and scale.
        base: the base LM that reads its gists.
        made_by: how it was trained, for people.
    """
    about = {"settings": settings, "width": base.width, "base": of_embeddings(base), "weights": of_weights(base)}
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in net.state_dict().items()}
    _write(folder, "gistnet", about | {"made_by": made_by}, weights)


def save_lensnet(net: LensNet, settings: dict, gistnet: GistNet, folder: str | Path, made_by: str = "") -> None:
    """Write a LensNet into a folder, its matrices in bf16; one that is there is replaced once the new one is whole.

    Args:
        settings: what it was built from, keyword arguments of ``LensNet`` other than width and block size.
        gistnet: whose gists it was trained to judge.
        made_by: how it was trained, for people.
    """
    about = {"settings": settings, "width": net.width, "block_size": net.block_size, "gistnet": of_net(gistnet)}
    # tau and counters as they are: a rounded unit would move every score.
    weights = {name: t.to(torch.bfloat16) if t.ndim else t for name, t in net.state_dict().items()}
    _write(folder, "lensnet", about | {"made_by": made_by}, weights)


def _write(folder: str | Path, part: str, about: dict, weights: dict) -> None:
    with replacing(folder) as out:
        out.mkdir()
        (out / f"{part}.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, out / WEIGHTS)
