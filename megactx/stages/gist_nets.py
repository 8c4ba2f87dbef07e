"""What a gist stage trains, and its optimizer."""

from contextlib import nullcontext

from torch import nn

from megactx.gist.backbone import Backbone
from megactx.gist.base_backbone import BaseBackbone
from megactx.gist.carrier import Compressor
from megactx.gist.compressors import build
from megactx.lm import BaseLM

from .kept_controls import own_draws


def build_nets(
    base: BaseLM, compressor: dict, settings_of_gistnet: dict, controls: dict, own: bool = False
) -> nn.ModuleDict:
    """The compressor that a stage is about, under its name and first, and the controls that learn beside it.

    With ``own`` the first weights of a control do not depend on what was built before it, see ``kept_controls``.

    Raises:
        ValueError: a setting that is not allowed, or a control of other blocks.
    """
    compressor = dict(compressor)
    name = compressor.get("name", "gistnet")
    if name in controls and controls[name] is not None:
        raise ValueError(f"stage.controls.{name}: the compressor has that name already")
    main = build(base, settings_of_gistnet | compressor) if name == "gistnet" else build(base, compressor)
    nets = nn.ModuleDict({name: main})
    for name, settings in controls.items():
        if settings is None:
            continue
        settings = {key: value for key, value in settings.items() if key != "lr"}
        with own_draws(name) if own else nullcontext():
            nets[name] = build(base, settings, f"stage.controls.{name}")
        if nets[name].block_size != main.block_size:
            raise ValueError(
                f"stage.controls.{name}.block_size={nets[name].block_size} differs from block_size={main.block_size}: "
                "controls see the same blocks"
            )
    return nets


def groups_of(nets: nn.ModuleDict, lr: float, muon_lr: float | None, weight_decay: float, controls: dict) -> list[dict]:
    """AdamW for everything, but Muon for the matrices of every GistNet with a backbone; the same decay for all.

    Args:
        lr: of AdamW; a control with an ``lr`` of its own has that.
        muon_lr: ``None`` leaves all to AdamW. What has no backbone keeps AdamW, which measured better for it.
    """
    muon = muon_lr is not None
    matrices = [p for net in nets.values() if muon and with_backbone(net) for p in net.parameters() if p.ndim == 2]
    known, groups = {id(p) for p in matrices}, {}
    for name, net in nets.items():
        rate = (controls.get(name) or {}).get("lr") or lr
        groups.setdefault(rate, []).extend(p for p in net.parameters() if id(p) not in known)
    groups = [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]
    groups.append({"params": matrices, "lr": muon_lr, "muon": True})
    return [group | {"weight_decay": weight_decay} for group in groups]


def with_backbone(net: Compressor) -> bool:
    """A GistNet with blocks of its own: more than a map of its block's mean, or adapters in the base's layers."""
    return isinstance(getattr(net, "backbone", None), Backbone)


def reads_with_base(net: Compressor) -> bool:
    """A GistNet whose encoder is layers of the base LM."""
    return isinstance(getattr(net, "backbone", None), BaseBackbone)


def refuse_without_vectors(settings) -> None:
    """A report that needs a vector of each block, for a compressor that makes keys and values, or several vectors.

    Raises:
        ValueError: naming the setting.
    """
    if steps := settings.evaluate["reconstruction"]:
        raise ValueError(
            f"stage.evaluate.reconstruction={steps} is not allowed with compressor={settings.compressor['name']}, which"
            " makes keys and values, or several vectors of a block: 0"
        )
