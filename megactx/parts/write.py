"""Trained parts as folders: a description in JSON, the weights beside it.

python -m megactx.parts.write RUN OUT        the GistNet of a run, in bf16, for any session with its base LM
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from megactx.focus.keys import Keys
from megactx.focus.lensnet import LensNet
from megactx.framework.command_line import run
from megactx.framework.files import replacing
from megactx.gist import GistNet
from megactx.lm import BaseLM
from megactx.lm.identity import of_embeddings, of_net, of_weights, record_of
from megactx.memory.prediction import Readout

from .find import WEIGHTS, find, read_best
from .read import gistnet_of, gistnet_settings


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


def save_keys(net: Keys, base: BaseLM, folder: str | Path, made_by: str = "") -> None:
    """Write a net of keys into a folder, its matrices in bf16, without what it reads: the base LM's embeddings, or
    a sentence encoder.

    Args:
        made_by: how it was trained, for people.
    """
    weights = {name: t.to(torch.bfloat16) if t.ndim else t for name, t in net.state_dict().items()}
    about = {"size": net.size, "width": net.project.in_features, "base": of_embeddings(base)}
    about |= {"reads": net.reads, "made_by": made_by}
    _write(folder, "keys", about, weights)


def save_prediction(net: Readout, settings: dict, gistnet: GistNet, folder: str | Path, made_by: str = "") -> None:
    """Write a readout into a folder, its matrices in bf16.

    Args:
        settings: what it was built from, keyword arguments of ``Readout`` other than the width.
        gistnet: whose gists it foretells.
        made_by: how it was trained, for people.
    """
    about = {"settings": settings, "width": net.width, "gistnet": of_net(gistnet), "made_by": made_by}
    _write(folder, "prediction", about, {name: t.to(torch.bfloat16) for name, t in net.state_dict().items()})


def _write(folder: str | Path, part: str, about: dict, weights: dict) -> None:
    with replacing(folder) as out:
        out.mkdir()
        (out / f"{part}.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, out / WEIGHTS)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    about = "The GistNet of a run as a folder."
    parser = argparse.ArgumentParser(prog="python -m megactx.parts.write", description=about)
    parser.add_argument("run", metavar="RUN", help="run folder or checkpoint of a gist stage")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder; one that is there is replaced")
    return run(_write_run, parser, arguments)


def _write_run(args: argparse.Namespace) -> None:
    place = find(args.run, "gistnet", "RUN")
    checkpoint = read_best(place, "RUN")
    base = BaseLM.from_pretrained(checkpoint["hyper_parameters"]["base"]["name"], "float32").freeze()
    record = record_of(base, checkpoint["hyper_parameters"]["base"]["name"])
    net = gistnet_of(args.run, base, "RUN", record, slots=True)
    made_by = f"step {checkpoint['global_step']} of {Path(args.run).resolve().name}"
    save_gistnet(net, gistnet_settings(args.run, "RUN"), base, args.out, made_by)
    print(f"{args.out}: GistNet for {record['name']}, {made_by}")
    print(f"Next: python -m megactx.studies.gist_card {record['name'].removeprefix('asset:')} --gistnet {args.out}")


if __name__ == "__main__":
    sys.exit(main())
