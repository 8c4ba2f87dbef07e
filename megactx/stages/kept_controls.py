"""Controls that an earlier run has trained: the same recipe on the same blocks is not trained twice.

    $MEGACTX_CACHE/controls/KEY.safetensors

A control learns for itself: its gradient, its clipping and its optimizer know nothing of the other nets. So what it
becomes follows from its settings, the seed, the base LM, the texts and the blocks that are drawn, the losses, the
optimizer, the length and the code, and their hash is its name. Which compressor it was trained beside is not in it, and
its first weights are drawn from the seed and its name alone.

A control is kept when its training has run to the end. Where it is taken it has all its steps, the compressor at its
best step maybe fewer.
"""

import hashlib
import inspect
import json
import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import megactx
from megactx.data.documents import cache_folder
from megactx.framework.errors import RunFailed
from megactx.framework.files import replacing

log = logging.getLogger(__name__)

# Of a stage's settings: what a control's training does not depend on.
OTHERS = ("base", "gistnet", "compressor", "controls", "targets", "evaluate", "init", "prefills", "keep_controls")
# Of the data: what is in its texts' fingerprint, or draws no block.
ASIDE = ("source", "tokenizer", "workers", "validation_documents", "validation_blocks")
CODE = ("gist", "lm", "data", "framework/optimizers.py", "stages/gist.py", "stages/gist_nets.py")


@contextmanager
def own_draws(name: str) -> Iterator[None]:
    """Inside, random numbers come from the run's seed and this name; those outside go on as if nothing was drawn."""
    seed = zlib.crc32(f"{torch.initial_seed()} {name}".encode())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class KeptControls:
    """Of a gist stage whose data is set up.

    Args:
        place: folder; ``None``: that of the cache.
    """

    def __init__(self, stage, datamodule, trainer, place: Path | None = None):
        self.nets, self.settings = stage.nets, stage.hparams.controls
        self.place = place or cache_folder() / "controls"
        h = stage.hparams
        data = {n: getattr(datamodule, n) for n in inspect.signature(type(datamodule)).parameters if n not in ASIDE}
        self.recipe = {
            "base": {key: stage.base_record[key] for key in ("embeddings", "weights")},
            "precision": str(trainer.precision),
            "dtype": str(stage.base.model.dtype),
            "prefills": (h.prefills or {}).get("dtype") if (h.prefills or {}).get("gigabytes") else None,
            "stage": {name: value for name, value in h.items() if name not in OTHERS},
            "texts": datamodule.source.fingerprint(),
            "data": data,
            "batches": trainer.accumulate_grad_batches,
            "processes": trainer.world_size,
            "clip": trainer.gradient_clip_val,
            "seed": torch.initial_seed(),
            "code": _code(),
            "torch": torch.__version__,
        }
        self.same = True  # this run has been trained by this recipe from its first step on
        try:
            self.place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"stage.keep_controls=true: {self.place} cannot be made ({error.strerror})") from error
        if not os.access(self.place, os.W_OK):
            raise ValueError(f"stage.keep_controls=true: {self.place} cannot be written; set MEGACTX_CACHE to a folder")

    def file(self, name: str) -> Path:
        """Where a control lies, or would lie."""
        return self.place / f"{_digest(self.recipe | {'name': name, 'control': self.settings[name]})}.safetensors"

    def state(self) -> dict[str, str]:
        """What a checkpoint stores of the recipe."""
        settings = {name: value for name, value in self.recipe.items() if name not in ("code", "torch")}
        return {"settings": _digest(settings), "all": _digest(self.recipe)}

    def going_on(self, before: dict[str, str]) -> None:
        """See that a run that goes on is the one that was begun; with other code its controls are not kept.

        Args:
            before: ``state`` of the checkpoint.

        Raises:
            ValueError: it has other settings: a control that was taken would have been trained by others too.
        """
        now = self.state()
        if before["settings"] != now["settings"]:
            raise ValueError(
                "stage.keep_controls=true: the run was begun with another length, or other settings of training or of"
                " its data; its controls belong to those. Start in a new folder"
            )
        self.same = before["all"] == now["all"]

    def take(self) -> list[str]:
        """Load the controls that are there into their nets; -> their names."""
        return [name for name, net in list(self.nets.items())[1:] if _loaded(net, self.file(name))]

    def keep(self, names: list[str]) -> None:
        """Write controls whose training has ended. Where that fails, the run goes on to its report."""
        for name in names if self.same else ():
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in self.nets[name].state_dict().items()}
            try:
                with replacing(self.file(name)) as part:
                    save_file(tensors, part)
            except (RunFailed, ValueError) as error:
                log.warning("stage.controls.%s is not kept for later runs: %s", name, error)


def _digest(of: dict) -> str:
    return hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _loaded(net: nn.Module, file: Path) -> bool:
    """Whether there is such a file. A damaged one is as good as none: the control is trained and written again."""
    try:
        net.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError):
        return False
    return True


def _code() -> str:
    """Of all that training a control runs through."""
    root, digest = Path(megactx.__file__).parent, hashlib.sha256()
    for own in CODE:
        for file in sorted((root / own).rglob("*.py")) if (root / own).is_dir() else [root / own]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
