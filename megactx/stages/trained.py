"""What other stages start from: a trained GistNet, wherever it is."""

from pathlib import Path

from megactx.assets import resolve
from megactx.framework.resume import best, read
from megactx.gist import GistNet
from megactx.gist.compressors import build
from megactx.gist.pretrained import SETTINGS, load_gistnet
from megactx.lm import BaseLM


def gistnet_of(path: str, base: BaseLM) -> GistNet:
    """A GistNet in eval mode.

    Args:
        path: ``asset:NAME``, a folder of ``save_gistnet``, a run folder of a gist stage (the best checkpoint counts),
            or a checkpoint.

    Raises:
        ValueError: there is none, it is of another compressor, or of another base.
    """
    folder = Path(resolve(path) if str(path).startswith("asset:") else path).expanduser()
    if not folder.exists():
        raise ValueError(f"gistnet={path}: there is no such folder or checkpoint")
    if (folder / SETTINGS).exists():
        return load_gistnet(folder, base)
    checkpoint = read(best(folder) if folder.is_dir() else folder)
    prefix = "nets.gistnet."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    if not weights:
        raise ValueError(f"gistnet={path}: no GistNet was trained there")
    net = build(base, checkpoint["hyper_parameters"]["gistnet"], "gistnet")
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"gistnet={path}: its weights do not fit this base LM ({error})") from error
    return net.eval()
