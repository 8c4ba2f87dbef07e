"""What learns in the joint stages: where GistNet, LensNet and adapters come from, and their one optimizer."""

from pathlib import Path

from torch import nn

from megactx.focus.lensnet import LensNet
from megactx.focus.pretrained import SETTINGS, load_lensnet
from megactx.framework.resume import other_base, read_best, refuse_other_base
from megactx.gist import GistNet
from megactx.lm.adapters import adapters_of

from .trained import folder_of

TRAIN_BASE = ("frozen", "lora", "full")


def lensnet_of(path: str | None, settings: dict, gistnet: GistNet, base: dict) -> LensNet:
    """A LensNet that can be trained: a new one, or that of a lens run.

    Args:
        path: ``asset:NAME``, a run folder or checkpoint of a lens stage, or a folder of ``save_lensnet``; ``None``: a
            new one.
        settings: keyword arguments of ``LensNet`` other than width and block size, of a new one.
        base: ``record_of`` the base LM.

    Raises:
        ValueError: there is none, it is of another base LM, or it does not fit these settings.
    """
    net = LensNet(gistnet.width, gistnet.block_size, **settings)
    if path is None:
        return net
    folder = folder_of(path, "stage.lens")
    if (folder / SETTINGS).exists():
        try:
            weights = load_lensnet(folder, gistnet).state_dict()
        except ValueError as error:
            raise ValueError(f"stage.lens={path}: {error}; stage.lens=null starts a new one") from error
    else:
        checkpoint = read_best(folder, "stage.lens")
        refuse_other_base(checkpoint, base, f"stage.lens={path}: ")
        weights = _under(checkpoint, "lens.")
    if not weights:
        raise ValueError(f"stage.lens={path}: no LensNet was trained there")
    _fill(net, weights, f"stage.lens={path}: its LensNet", "the group lensnet")
    return net


def take_parts(stage, path: Path) -> str:
    """Load what another joint run has learned, see ``JointStage.start_from``."""
    checkpoint = read_best(path, "stage.init")
    other = other_base(checkpoint, stage.base_record)
    for name in ("gistnet", "lens"):
        what = f"stage.init={path}: its {'GistNet' if name == 'gistnet' else 'LensNet'}"
        if not (weights := _under(checkpoint, f"{name}.")):
            raise ValueError(f"{what} is not there; it is no run of a joint stage, or of a lens stage")
        _fill(getattr(stage, name), weights, f"{what}: {other}; it" if other else what, "this run's settings")
    there, mine = _under(checkpoint, "base."), stage.base.state_dict()
    adapters = set(adapters_of(stage.base))
    if there and not set(there) <= set(mine) or adapters - set(there) and there:
        raise ValueError(
            f"stage.init={path}: its base LM has other adapters; set stage.lora and stage.train_base alike"
        )
    if any(mine[key].shape != value.shape for key, value in there.items()):
        raise ValueError(f"stage.init={path}: its adapters have another rank than stage.lora.rank")
    stage.base.load_state_dict(mine | there)
    told = f"Starting from {path}, step {checkpoint['global_step']}: GistNet, LensNet" + (", base LM" if there else "")
    return f"{told}\n  {other}" if other else told


def kept_of_base(stage) -> set[str]:
    """Names of the base LM's tensors that a checkpoint must hold: its adapters, or all of one that is trained."""
    if stage.train_base == "full":
        return set(stage.base.state_dict())
    return set(adapters_of(stage.base))


def _under(checkpoint: dict, prefix: str) -> dict:
    found = checkpoint["state_dict"]
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def _fill(net: nn.Module, weights: dict, what: str, asked: str) -> None:
    shapes = {name: value.shape for name, value in net.state_dict().items()}
    if {name: value.shape for name, value in weights.items()} != shapes:
        raise ValueError(f"{what} has another architecture than {asked}")
    net.load_state_dict(weights)
