"""Trained parts as modules: a GistNet for its base LM, a LensNet for its GistNet."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from megactx.focus.keys import KeyNet, Keys
from megactx.focus.lensnet import LensNet
from megactx.focus.sentence_keys import SentenceKeys
from megactx.gist import GistNet
from megactx.gist.compressors import build
from megactx.lm import BaseLM
from megactx.lm.adapters import active_adapters
from megactx.lm.identity import of_embeddings, of_net, of_weights, raw, record_of
from megactx.lm.sentences import WIDTH, SentenceEncoder, fastest
from megactx.memory.prediction import Readout

from .find import GISTNET, KEYS, LENSNET, WEIGHTS, find, read_best, refuse_other_base, under

IN_CHECKPOINTS = ("nets.gistnet.", "gistnet.")  # of a gist stage, and of those that start from a GistNet


def gistnet_of(
    path: str | Path, base: BaseLM, setting: str = "gistnet", record: dict | None = None, slots: bool = False
) -> GistNet:
    """A GistNet in eval mode, fp32.

    Args:
        path: see ``megactx.parts``.
        setting: what has named it, for messages.
        record: ``record_of`` the base LM, where it is known.
        slots: it may make several vectors of a block, of which there is no tree.

    Raises:
        ValueError: there is none, it is of another compressor, or of another base, or makes several vectors.
    """
    place = find(path, "gistnet", setting)
    net = (
        load_gistnet(place, base, setting)
        if (place / GISTNET).exists()
        else _of_run(path, place, base, setting, record)
    )
    if net.slots > 1 and not slots:
        raise ValueError(
            f"{setting}={path}: its gistnet.slots={net.slots} is not allowed here: a block of a tree has 1"
        )
    return net


def _of_run(path: str | Path, place: Path, base: BaseLM, setting: str, record: dict | None) -> GistNet:
    checkpoint = read_best(place, setting)
    refuse_other_base(checkpoint, record or record_of(base, "of this run"), f"{setting}={path}: ")
    if not (weights := under(checkpoint, *IN_CHECKPOINTS)):
        raise ValueError(f"{setting}={path}: no GistNet was trained there")
    net = build(base, gistnet_settings(path, setting), "gistnet")
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{setting}={path}: its weights do not fit this base LM ({error})") from error
    return net.float().eval()


def gistnet_settings(path: str | Path, setting: str = "gistnet") -> dict:
    """What the GistNet of ``gistnet_of`` was built from: keyword arguments of ``GistNet``.

    Raises:
        ValueError: there is no such folder or checkpoint.
    """
    place = find(path, "gistnet", setting)
    if (place / GISTNET).exists():
        return _described(place, "gistnet", "settings")["settings"]
    given = read_best(place, setting)["hyper_parameters"].get("gistnet")
    if given is None:
        raise ValueError(f"{setting}={path}: no GistNet was trained there")
    return given if isinstance(given, dict) else gistnet_settings(given, f"{setting}={path}, which began with gistnet")


def lensnet_of(path: str | Path, gistnet: GistNet, record: dict, setting: str, settings: dict | None = None) -> LensNet:
    """A LensNet that can be trained.

    Args:
        path: see ``megactx.parts``.
        record: ``record_of`` the base LM.
        setting: what has named the path, for messages.
        settings: keyword arguments of ``LensNet`` that it must have; ``None``: those it has.

    Raises:
        ValueError: there is none, it is of another base LM or GistNet, or it has other settings.
    """
    place = find(path, "lensnet", setting)
    if (place / LENSNET).exists():
        try:
            found = load_lensnet(place, gistnet)
        except ValueError as error:
            remedy = f"; {setting}=null starts a new one" if settings else ""
            raise ValueError(f"{setting}={path}: {error}{remedy}") from error
        if settings is None:
            return found
        weights = found.state_dict()
    else:
        checkpoint = read_best(place, setting)
        refuse_other_base(checkpoint, record, f"{setting}={path}: ")
        if not (weights := under(checkpoint, "lens.")):
            raise ValueError(f"{setting}={path}: no LensNet was trained there")
        settings = checkpoint["hyper_parameters"]["lensnet"] if settings is None else settings
    net = LensNet(gistnet.width, gistnet.block_size, **settings)
    if not take(net, weights):
        raise ValueError(f"{setting}={path}: its LensNet has another architecture than the group lensnet")
    return net


def take(net: nn.Module, weights: dict) -> bool:
    """Load weights into a net where they are of the same names and shapes; -> whether they are."""
    shapes = {name: value.shape for name, value in net.state_dict().items()}
    if fits := {name: value.shape for name, value in weights.items()} == shapes:
        net.load_state_dict(weights)
    return fits


def load_gistnet(folder: str | Path, base: BaseLM, setting: str = "gistnet") -> GistNet:
    """Read the folder of ``save_gistnet`` for the base LM that it was trained with, in eval mode, fp32.

    ``setting`` is what has named it, for messages.

    Raises:
        ValueError: there is none in the folder, its description is damaged, it is of another base LM, or its weights
            do not fit.
    """
    about = _described(folder, "gistnet", "settings", "width", "base")
    other = "embeddings" if about["base"] not in (of_embeddings(base), _of_before(base)) else ""
    if not other and about.get("weights") not in (None, of_weights(base)):
        other = "layers"
    if other:
        raise ValueError(
            f"{setting}={folder} was trained with another base LM (width {about['width']}); this one, of width"
            f" {base.width}, has other {other}"
        )
    return _filled(build(base, about["settings"], "gistnet"), folder, "gistnet")


def load_lensnet(folder: str | Path, gistnet: GistNet) -> LensNet:
    """Read the folder of ``save_lensnet`` for the GistNet that it was trained with, in eval mode, fp32, frozen.

    Raises:
        ValueError: there is none in the folder, its description is damaged, it is of another GistNet, or its weights
            do not fit.
    """
    about = _described(folder, "lensnet", "settings", "width", "block_size", "gistnet")
    for name in ("width", "block_size"):
        if about[name] != getattr(gistnet, name):
            raise ValueError(f"lensnet={folder}: its {name} is {about[name]}, the GistNet's {getattr(gistnet, name)}")
    if about["gistnet"] != (own := of_net(gistnet)):
        raise ValueError(f"lensnet={folder} was trained with another GistNet: {about['gistnet']}, this one is {own}")
    try:
        net = LensNet(about["width"], about["block_size"], **about["settings"])
    except TypeError as error:
        raise ValueError(f"lensnet={folder}: {LENSNET} is damaged ({error})") from error
    return _filled(net, folder, "lensnet").requires_grad_(False)


def load_keys(folder: str | Path, base: BaseLM, ready: bool = True) -> Keys:
    """Read the folder of ``save_keys`` for the base LM whose embeddings it was trained on, fp32, frozen.

    Args:
        ready: to make keys now; else what a sentence encoder has is read, and may be missing, when it is needed.

    Raises:
        ValueError: there is none in the folder, its description is damaged, it is of another base LM, or its weights do
            not fit; or a sentence encoder is missing that it reads.
    """
    about = _described(folder, "keys", "size", "base")
    if about["base"] != (own := of_embeddings(base)):
        raise ValueError(f"keys={folder}: trained on other embeddings, {about['base']}; those of the base LM are {own}")
    reads = about.get("reads", KeyNet.reads)
    try:
        if reads == SentenceKeys.reads:
            encoder, width = SentenceEncoder(f"keys={folder}", fastest()), about.get("width", WIDTH)
            net = SentenceKeys(base.tokenizer, encoder, about["size"], width)
        else:
            net = KeyNet(base.model.get_input_embeddings().weight, about["size"])
    except TypeError as error:
        raise ValueError(f"keys={folder}: {KEYS} is damaged ({error})") from error
    net = _filled(net, folder, "keys").requires_grad_(False)
    return net.ready() if ready else net


def load_prediction(folder: str | Path, gistnet: GistNet) -> Readout:
    """Read the folder of ``save_prediction`` for the GistNet whose gists it foretells, fp32, frozen.

    Raises:
        ValueError: there is none in the folder, its description is damaged, it is of another GistNet, or its weights do
            not fit.
    """
    about = _described(folder, "prediction", "settings", "width", "gistnet")
    if about["gistnet"] != (own := of_net(gistnet)):
        raise ValueError(f"prediction={folder} was trained with another GistNet: {about['gistnet']}, this one is {own}")
    try:
        net = Readout(about["width"], **about["settings"])
    except TypeError as error:
        raise ValueError(f"prediction={folder}: prediction.json is damaged ({error})") from error
    return _filled(net, folder, "prediction").requires_grad_(False)


def _described(folder: str | Path, part: str, *names: str) -> dict:
    """What the folder of a part says of it, ``names`` at least."""
    file, folder = f"{part}.json", Path(folder)
    if not (folder / file).is_file() or not (folder / WEIGHTS).is_file():
        name = {"gistnet": "GistNet", "lensnet": "LensNet", "keys": "net of keys", "prediction": "readout"}[part]
        raise ValueError(f"{part}={folder}: there is no {name} in it ({file} and {WEIGHTS})")
    try:
        about = json.loads((folder / file).read_text(encoding="utf-8"))
        return about | {name: about[name] for name in names}
    except (KeyError, TypeError, ValueError) as error:  # no JSON, or no UTF-8
        raise ValueError(f"{part}={folder}: {file} is damaged ({type(error).__name__}: {error})") from error


def _filled(net: nn.Module, folder: str | Path, part: str) -> nn.Module:
    try:
        net.load_state_dict(load_file(Path(folder) / WEIGHTS))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{part}={folder}: its weights do not fit its settings ({error})") from error
    return net.float().eval()


def _of_before(base: BaseLM) -> str | None:
    """What GistNets that were saved earlier say of a base LM; ``None`` where adapters change its embeddings."""
    embeddings = base.model.get_input_embeddings()
    if active_adapters(embeddings):
        return None
    return hashlib.sha256(raw(embeddings.weight.to(torch.bfloat16)).tobytes()).hexdigest()[:16]
