"""What a stage takes from another run: ``stage.init``."""

from pathlib import Path

from torch import nn

from megactx.framework.run.resume import differences, with_weights
from megactx.lm import BaseLM
from megactx.lm.adapters import adapters_of
from megactx.parts.find import GISTNET, find, other_base, read_best, under
from megactx.parts.read import gistnet_of, gistnet_settings, take


def take_weights(nets: nn.ModuleDict, path: str, settings_of_gistnet: dict, base: dict, own: BaseLM) -> str:
    """Load what another run or a saved GistNet has of these nets, see ``GistStage.start_from``.

    Args:
        base: ``record_of`` this base LM, ``own``.
    """
    place = find(path, "gistnet", "stage.init")
    if (place / GISTNET).is_file():
        changes = differences(gistnet_settings(path, "stage.init"), settings_of_gistnet, "gistnet")
        name, main = next(iter(nets.items()))
        if not take(main, gistnet_of(path, own, "stage.init", base, slots=True).state_dict()):
            raise ValueError(
                f"stage.init={path}: its GistNet has another architecture: {'; '.join(changes) or 'see its tensors'}"
            )
        changes = [line for line in changes if not line.startswith("gistnet.dropout:")]
        return "\n".join([f"Starting from {path}: {name}", *(f"  {line}" for line in changes)])
    checkpoint = read_best(place, "stage.init")
    other = other_base(checkpoint, base)
    changes = differences(checkpoint["hyper_parameters"].get("gistnet") or {}, settings_of_gistnet, "gistnet")
    changes = [line for line in changes if not line.startswith("gistnet.dropout:")]
    taken = [name for name, net in nets.items() if take(net, under(checkpoint, f"nets.{name}."))]
    if (main := next(iter(nets))) not in taken:
        what, why = "GistNet" if main == "gistnet" else main, [other] * bool(other) + with_weights(changes)
        raise ValueError(
            f"stage.init={path}: its {what} has another architecture: {'; '.join(why) or 'see its tensors'}"
        )
    told = f"Starting from {path}, step {checkpoint['global_step']}: {', '.join(taken)}"
    return "\n".join([told, *(f"  {line}" for line in [other] * bool(other) + changes)])


def take_parts(stage, path: Path) -> str:
    """Load what another joint run has learned, see ``JointStage.start_from``."""
    checkpoint = read_best(path, "stage.init")
    other = other_base(checkpoint, stage.base_record)
    for name in ("gistnet", "lens"):
        what = f"stage.init={path}: its {'GistNet' if name == 'gistnet' else 'LensNet'}"
        if not (weights := under(checkpoint, f"{name}.")):
            raise ValueError(f"{what} is not there; it is no run of a joint stage, or of a lens stage")
        if not take(getattr(stage, name), weights):
            raise ValueError(
                f"{what}{f': {other}; it' * bool(other)} has another architecture than this run's settings"
            )
    there, mine = under(checkpoint, "base."), stage.base.state_dict()
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
