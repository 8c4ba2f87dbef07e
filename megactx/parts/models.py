"""The models that a session needs, from a run folder, an exported folder, or the package itself.

nothing                 the embedded base LM, its GistNet and its LensNet
asset with a GistNet    ``smollm2``: a base LM of another package, and ``asset:smollm2-gistnet`` and -keys of this one
exported folder         a Hugging Face folder with gistnet/ and, where there are such, lensnet/, keys/ and prediction/
run of a lens stage     all three; of a gist stage: base and GistNet; of a base stage: the base LM alone
Hugging Face folder     a base LM alone, as are a GGUF file, a folder with one in it, and any other ``asset:NAME``
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from megactx.assets import is_gguf, known, resolve
from megactx.focus import LensNet
from megactx.focus.keys import Keys
from megactx.framework.run.resume import best, read
from megactx.gist import GistNet
from megactx.lm import BaseLM
from megactx.lm.identity import record_of
from megactx.memory.prediction import Readout

from .find import GISTNET, KEYS, LENSNET, PREDICTION, refuse_other_base
from .read import gistnet_of, lensnet_of, load_gistnet, load_keys, load_lensnet, load_prediction

EMBEDDED = "asset:tiny-base"
PARTS = {"gistnet": GISTNET, "lensnet": LENSNET, "keys": KEYS, "prediction": PREDICTION}  # folder -> its description


@dataclass(frozen=True)
class Models:
    """All frozen, in eval mode, on one device."""

    base: BaseLM
    gistnet: GistNet | None = None
    lensnet: LensNet | None = None
    name: str = ""  # where they came from, for people
    keys: Keys | None = None  # of blocks, for this base LM
    prediction: Readout | None = None  # of the next gist, for this base LM and GistNet

    def to(self, device) -> "Models":
        """The same on a device: a base LM in bf16 on a GPU, in fp32 on a CPU."""
        device = torch.device(device)
        parts = [
            None if part is None else part.to(device).requires_grad_(False)
            for part in (self.gistnet, self.lensnet, self.keys, self.prediction)
        ]
        self.base.freeze().to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        return Models(self.base, *parts[:2], self.name, *parts[2:])


def load_models(path: str | None = None, device: str | None = None, setting: str = "model") -> Models:
    """Models from ``path``, see above; on the GPU where there is one. ``setting`` gives the path, for what errors say.

    Raises:
        ValueError: there are none, or they do not belong together.
    """
    return _read(path, setting).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _read(path: str | None, setting: str) -> Models:
    if path is None:
        return _together(resolve(EMBEDDED), _of_package("tiny"), "the embedded models", setting)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        name = path if is_gguf(path) or path.startswith("asset:") else f"asset:{path}"
        if not is_gguf(name) and name not in known():
            raise ValueError(f"{setting}={path}: there is no such folder, file or asset")
        if f"{name}-gistnet" in known():
            return _together(name, _of_package(name.removeprefix("asset:")), path, setting)
        return Models(BaseLM.from_pretrained(name, "float32", setting), name=path)
    if (folder / "gistnet" / GISTNET).is_file():
        return _together(
            folder, {part: folder / part for part in PARTS if (folder / part / PARTS[part]).is_file()}, path, setting
        )
    for own in (folder / "model", folder):  # of a run of a base stage; or a model itself
        if (own / "config.json").is_file() or own == folder and is_gguf(resolve(folder, setting)):
            return Models(BaseLM.from_pretrained(str(own), "float32", setting), name=str(path))
    return _of_run(folder, setting)


def _of_package(name: str) -> dict[str, str]:
    """part -> folder, of the parts that the package has for a base LM of this name."""
    return {part: resolve(f"asset:{name}-{part}") for part in PARTS if f"asset:{name}-{part}" in known()}


def _together(base: str | Path, parts: dict[str, str | Path], name: str, setting: str) -> Models:
    """Models from the folders of each, a GistNet at least."""
    base = BaseLM.from_pretrained(str(base), "float32", setting).freeze()
    net = load_gistnet(parts["gistnet"], base)
    lens = load_lensnet(parts["lensnet"], net) if "lensnet" in parts else None
    keys = load_keys(parts["keys"], base, ready=False) if "keys" in parts else None
    prediction = load_prediction(parts["prediction"], net) if "prediction" in parts else None
    return Models(base, net, lens, str(name), keys, prediction)


def _of_run(folder: Path, setting: str) -> Models:
    """Models of a run folder of a gist or a lens stage, from its best checkpoint."""
    checkpoint = read(best(folder))
    settings = checkpoint.get("hyper_parameters", {})
    if "train_base" in settings:
        raise ValueError(
            f"{setting}={folder}: it is a run of a joint stage, whose base LM may have adapters; export it first:"
            f" python -m megactx.stages.export {folder} OUT"
        )
    if "base" not in settings or "gistnet" not in settings:
        raise ValueError(f"{setting}={folder}: it is a run of neither a gist nor a lens stage, and no model's folder")
    base = BaseLM.from_pretrained(settings["base"]["name"], "float32").freeze()
    record = record_of(base, settings["base"]["name"])
    refuse_other_base(checkpoint, record, f"{setting}={folder}: ")  # the folder of the base may hold another one by now
    gistnet = gistnet_of(folder, base, setting, record)
    lensnet = lensnet_of(folder, gistnet, record, setting).eval() if "lensnet" in settings else None
    return Models(base, gistnet, lensnet, str(folder))
