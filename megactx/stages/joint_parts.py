"""What learns in the joint stages: where GistNet, LensNet and adapters come from, and their one optimizer."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from megactx.focus.lensnet import LensNet
from megactx.focus.pretrained import SETTINGS, load_lensnet
from megactx.framework.optimizers import MuonWithAdamW, warmup_cosine
from megactx.framework.resume import best, read
from megactx.gist import GistNet
from megactx.lm.adapters import adapters_of

from .trained import folder_of

BETAS = (0.9, 0.999)
TRAIN_BASE = ("frozen", "lora", "full")


def lensnet_of(path: str | None, settings: dict, gistnet: GistNet) -> LensNet:
    """A LensNet that can be trained: a new one, or that of a lens run.

    Args:
        path: ``asset:NAME``, a run folder or checkpoint of a lens stage, or a folder of ``save_lensnet``; ``None``: a
            new one.
        settings: keyword arguments of ``LensNet`` other than width and block size, of a new one.

    Raises:
        ValueError: there is none, or it does not fit these settings.
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
        weights = _under(read(best(folder) if folder.is_dir() else folder), "lens.")
    if not weights:
        raise ValueError(f"stage.lens={path}: no LensNet was trained there")
    _fill(net, weights, f"stage.lens={path}: its LensNet", "the group lensnet")
    return net


def take_parts(stage, path: Path) -> str:
    """Load what another joint run has learned, see ``JointStage.start_from``."""
    if not path.exists():
        raise ValueError(f"stage.init={path}: there is no such checkpoint or run folder")
    checkpoint = read(best(path) if path.is_dir() else path)
    for name in ("gistnet", "lens"):
        what = f"stage.init={path}: its {'GistNet' if name == 'gistnet' else 'LensNet'}"
        if not (weights := _under(checkpoint, f"{name}.")):
            raise ValueError(f"{what} is not there; it is no run of a joint stage, or of a lens stage")
        _fill(getattr(stage, name), weights, what, "this run's settings")
    there, mine = _under(checkpoint, "base."), stage.base.state_dict()
    adapters = set(adapters_of(stage.base))
    if there and not set(there) <= set(mine) or adapters - set(there) and there:
        raise ValueError(
            f"stage.init={path}: its base LM has other adapters; set stage.lora and stage.train_base alike"
        )
    if any(mine[key].shape != value.shape for key, value in there.items()):
        raise ValueError(f"stage.init={path}: its adapters have another rank than stage.lora.rank")
    stage.base.load_state_dict(mine | there)
    return f"Starting from {path}, step {checkpoint['global_step']}: GistNet, LensNet" + (", base LM" if there else "")


def kept_of_base(stage) -> set[str]:
    """Names of the base LM's tensors that a checkpoint must hold: its adapters, or all of one that is trained."""
    if stage.train_base == "full":
        return set(stage.base.state_dict())
    return set(adapters_of(stage.base))


def optimizer_of(stage, own_step: Callable[[int, str], int], total: dict[str, int]):
    """One optimizer for all parts, and its schedule: warm-up and cosine over the steps of each part.

    What has no gradient in a step is left as it is, state and all: so parts that take turns need no optimizers of their
    own.

    Args:
        stage: a ``JointStage``.
        own_step: (step, part) -> steps that the part had before.
        total: part -> steps that it will have; a part with 0 is left out.
    """
    h = stage.hparams
    gist, direct = list(stage.gistnet.parameters()), list(stage.lens.direct.parameters())
    known = {id(p) for p in direct}
    matrices = [p for p in gist if p.ndim == 2] if h.muon_lr is not None and total["gist"] else []
    others = {id(p) for p in matrices}
    groups = [
        {"part": "gist", "params": [p for p in gist if id(p) not in others], "lr": h.gist_lr},
        {"part": "lens", "params": [p for p in stage.lens.parameters() if id(p) not in known], "lr": h.lens_lr},
        {"part": "lens", "params": direct, "lr": h.direct_lr},
        {"part": "lora", "params": stage.base_parameters(), "lr": h.base_lr},
    ]
    groups.append({"part": "gist", "params": matrices, "lr": h.muon_lr, "muon": True})
    groups = [group | {"weight_decay": h.weight_decay} for group in groups if total[group["part"]]]
    optimizer = MuonWithAdamW(groups, BETAS)

    def factor(part: str, peak: float) -> Callable[[int], float]:
        floor = min(1.0, h.min_lr / peak) if peak else 1.0
        return lambda step: warmup_cosine(own_step(step, part), h.warmup, total[part], floor)

    factors = [factor(group["part"], group["lr"]) for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _under(checkpoint: dict, prefix: str) -> dict:
    found = checkpoint["state_dict"]
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def _fill(net: nn.Module, weights: dict, what: str, asked: str) -> None:
    shapes = {name: value.shape for name, value in net.state_dict().items()}
    if {name: value.shape for name, value in weights.items()} != shapes:
        raise ValueError(f"{what} has another architecture than {asked}")
    net.load_state_dict(weights)
