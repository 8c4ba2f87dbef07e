"""The models that a session needs, from a run folder, an exported folder, or the package itself.

nothing                 the embedded base LM, its GistNet and, where there is one, its LensNet
exported folder         a Hugging Face folder with gistnet/ and, where there is one, lensnet/ in it
run of a lens stage     all three; of a gist stage: base and GistNet; of a base stage: the base LM alone
Hugging Face folder     a base LM alone, as are a GGUF file, a folder with one in it, and a base of ``asset:NAME``
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from megactx.assets import is_gguf, known, resolve
from megactx.focus import LensNet
from megactx.focus.pretrained import SETTINGS as LENSNET
from megactx.focus.pretrained import load_lensnet
from megactx.framework.resume import best, other_base, read
from megactx.gist import GistNet
from megactx.gist.compressors import build
from megactx.gist.pretrained import SETTINGS as GISTNET
from megactx.gist.pretrained import load_gistnet
from megactx.lm import BaseLM
from megactx.lm.identity import of_embeddings, of_weights

EMBEDDED = {"base": "asset:tiny-base", "gistnet": "asset:tiny-gistnet", "lensnet": "asset:tiny-lensnet"}


@dataclass(frozen=True)
class Models:
    """All frozen, in eval mode, on one device."""

    base: BaseLM
    gistnet: GistNet | None = None
    lensnet: LensNet | None = None
    name: str = ""  # where they came from, for people

    def to(self, device) -> "Models":
        """The same on a device: a base LM in bf16 on a GPU, in fp32 on a CPU."""
        device = torch.device(device)
        parts = [
            None if part is None else part.to(device).requires_grad_(False) for part in (self.gistnet, self.lensnet)
        ]
        self.base.freeze().to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        return Models(self.base, *parts, self.name)


def load_models(path: str | None = None, device: str | None = None) -> Models:
    """Models from ``path``, see above; on the GPU where there is one.

    Raises:
        ValueError: there are none, or they do not belong together.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if path is None:
        return _embedded().to(device)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        name = path if is_gguf(path) or path.startswith("asset:") else f"asset:{path}"
        if not is_gguf(name) and name not in known():
            raise ValueError(f"model={path}: there is no such folder, file or asset")
        return Models(BaseLM.from_pretrained(name, "float32"), name=path).to(device)
    if (folder / "gistnet" / GISTNET).is_file():
        base = BaseLM.from_pretrained(str(folder), "float32").freeze()
        gistnet = load_gistnet(folder / "gistnet", base)
        lensnet = load_lensnet(folder / "lensnet", gistnet) if (folder / "lensnet" / LENSNET).is_file() else None
        return Models(base, gistnet, lensnet, str(path)).to(device)
    for own in (folder / "model", folder):  # of a run of a base stage; or a model itself
        if (own / "config.json").is_file():
            return Models(BaseLM.from_pretrained(str(own), "float32"), name=str(path)).to(device)
    if is_gguf(resolve(folder, "model")):
        return Models(BaseLM.from_pretrained(str(folder), "float32"), name=str(path)).to(device)
    return _of_run(folder).to(device)


def _embedded() -> Models:
    base = BaseLM.from_pretrained(EMBEDDED["base"], "float32").freeze()
    gistnet = load_gistnet(resolve(EMBEDDED["gistnet"]), base)
    try:
        lensnet = load_lensnet(resolve(EMBEDDED["lensnet"]), gistnet)
    except ValueError as error:
        if "no such asset" not in str(error):
            raise
        lensnet = None
    return Models(base, gistnet, lensnet, "the embedded models")


def _of_run(folder: Path) -> Models:
    """Models of a run folder of a gist or a lens stage, from its best checkpoint."""
    checkpoint = read(best(folder))
    settings, weights = checkpoint.get("hyper_parameters", {}), checkpoint["state_dict"]
    if "train_base" in settings:
        raise ValueError(
            f"model={folder}: it is a run of a joint stage, whose base LM may have adapters; export it first: python -m"
            f" megactx.stages.export {folder} OUT"
        )
    if "base" not in settings or "gistnet" not in settings:
        raise ValueError(f"model={folder}: it is a run of neither a gist nor a lens stage, and no model's folder")
    base = BaseLM.from_pretrained(settings["base"]["name"], "float32").freeze()
    mine = {"name": settings["base"]["name"], "width": base.width}
    mine |= {"embeddings": of_embeddings(base), "weights": of_weights(base)}
    if changed := other_base(checkpoint, mine):  # the folder holds another one by now
        raise ValueError(f"model={folder}: {changed}")
    gistnet = build(base, _gistnet_settings(settings["gistnet"]), "gistnet")
    if "lensnet" not in settings:
        _fill(gistnet, weights, "nets.gistnet.", folder)
        return Models(base, gistnet.float().eval(), name=str(folder))
    _fill(gistnet, weights, "gistnet.", folder)
    lensnet = LensNet(base.width, gistnet.block_size, **settings["lensnet"])
    _fill(lensnet, weights, "lens.", folder)
    return Models(base, gistnet.float().eval(), lensnet.float().eval(), str(folder))


def _gistnet_settings(given: dict | str) -> dict:
    """Those of a gist run; a lens run names an asset, a folder, a run or a checkpoint instead."""
    if isinstance(given, dict):
        return given
    folder = Path(resolve(given) if given.startswith("asset:") else given)
    if (folder / GISTNET).is_file():
        return json.loads((folder / GISTNET).read_text(encoding="utf-8"))["settings"]
    if not folder.exists():
        raise ValueError(f"model: its LensNet was trained with the GistNet of {given}, which is not there any more")
    return _gistnet_settings(read(best(folder) if folder.is_dir() else folder)["hyper_parameters"]["gistnet"])


def _fill(net: torch.nn.Module, weights: dict, prefix: str, folder: Path) -> None:
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    if not own:
        raise ValueError(f"model={folder}: there is no {prefix.split('.')[-2]} in its checkpoint")
    try:
        net.load_state_dict(own)
    except RuntimeError as error:
        raise ValueError(f"model={folder}: the weights do not fit the settings ({error})") from error
