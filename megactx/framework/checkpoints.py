"""Checkpoints that survive: written whole or not at all, plain dicts and tensors only."""

import contextlib
import errno
import os
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from .errors import RunFailed


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, then renames: a full disk or a kill never costs a checkpoint that is there."""

    def save_checkpoint(self, checkpoint: dict, path, storage_options=None) -> None:
        """Save under ``path``.

        Raises:
            RunFailed: the disk is full, or the file may not be written.
        """
        path = Path(path)
        part = path.with_name(f"{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            what = "the disk is full" if full or not isinstance(error, OSError) else "it cannot be written"
            raise RunFailed(
                f"the checkpoint {path} could not be saved: {what} ({error}). What was saved before is kept in"
                f" {path.parent}. Make room, or set folder=... to another disk, and go on with resume=auto"
            ) from error


class Best(ModelCheckpoint):
    """``best.ckpt``: a checkpoint at every new minimum of the stage's own ``monitor``; a stage without one has none."""

    def __init__(self, dirpath: str):
        super().__init__(
            dirpath=dirpath,
            filename="best",
            mode="min",
            save_top_k=1,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    def setup(self, trainer, pl_module, stage: str) -> None:
        self.monitor = getattr(pl_module, "monitor", None)
        super().setup(trainer, pl_module, stage)

    def _should_skip_saving_checkpoint(self, trainer) -> bool:
        return self.monitor is None or super()._should_skip_saving_checkpoint(trainer)


class Record(Callback):
    """Puts the resolved config of the run into its checkpoints, as a plain dict."""

    def __init__(self, config: dict):
        self.config = config

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        checkpoint["config"] = self.config


class RandomState(Callback):
    """Saves torch's random state and restores it on the first batch of a resumed run.

    On the first batch, not earlier: building loaders draws numbers. Validation draws too (each new loader iterator
    does), and a resumed run does not repeat it: so training goes on after it with the state from before it.
    """

    def __init__(self):
        self.now = self.pending = None

    def state_dict(self) -> dict:
        return self.now or _random_state()

    def load_state_dict(self, state: dict) -> None:
        self.pending = state

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.pending is not None:
            torch.set_rng_state(self.pending["cpu"].cpu())
            if torch.cuda.is_available() and len(self.pending["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all([state.cpu() for state in self.pending["cuda"]])
            self.pending = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.now = _random_state()

    def on_validation_start(self, trainer, pl_module) -> None:
        self.pending = self.now


def _random_state() -> dict:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}
