"""Checkpoints that survive: written whole or not at all, plain dicts and tensors only."""

import contextlib
import time
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ..errors import RunFailed, innermost
from ..files import IN_RUN, replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, then renames: a full disk or a kill never costs a checkpoint that is there."""

    def save_checkpoint(self, checkpoint: dict, path, storage_options=None) -> None:
        """Save under ``path``.

        Raises:
            RunFailed: the disk is full, or the file may not be written.
        """
        path = Path(path)
        try:
            with replacing(path, IN_RUN) as part, part.open("wb") as file:
                torch.save(checkpoint, file)
        except (RunFailed, ValueError, OSError, RuntimeError) as error:
            full = "full" in str(error) or not isinstance(error, (ValueError, OSError))
            raise RunFailed(
                f"the checkpoint {path} could not be saved: {'the disk is full' if full else 'it cannot be written'}"
                f" ({innermost(error)}). What was saved before is kept in {path.parent}. Make room, or set folder=..."
                " to another disk, and go on with resume=auto"
            ) from error


LATEST = 600  # seconds without a checkpoint


class Newest(ModelCheckpoint):
    """``step_NNNNNN.ckpt``, the newest, and ``last.ckpt``.

    Where a validation is due after the step, they are written behind it: so a run that goes on from them has the
    validation's row in its log, its new minimum in ``best.ckpt`` and what its callbacks concluded, and repeats none of
    it. It stands behind ``Best``, so that ``last.ckpt`` knows which minimum ``best.ckpt`` holds.

    Args:
        every_n_train_steps: steps between two checkpoints; where they take longer than ten minutes, there are more.
        save_top_k: 1 keeps the newest one, -1 all of them.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int, save_top_k: int = 1):
        super().__init__(
            dirpath=dirpath,
            filename="step_{step:06d}",  # no `=` in names: Hydra would read it
            auto_insert_metric_name=False,
            every_n_train_steps=every_n_train_steps,
            save_top_k=save_top_k,
            save_last=True,  # last.ckpt, which resume=auto reads
            enable_version_counter=False,  # a resumed run writes last.ckpt, not last-v1.ckpt
        )

    def on_train_start(self, trainer, pl_module) -> None:
        super().on_train_start(trainer, pl_module)
        self.written = time.monotonic()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if not validation_is_due(trainer):
            self._keep(trainer, pl_module)

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            self._keep(trainer, pl_module)

    def _keep(self, trainer, pl_module) -> None:
        """Where a checkpoint is due by the steps, or none was written for ten minutes: a kill costs no more."""
        before, steps = self._last_global_step_saved, self._every_n_train_steps
        whole = not (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % trainer.accumulate_grad_batches
        late = whole and trainer.strategy.reduce_boolean_decision(time.monotonic() - self.written > LATEST, all=False)
        try:
            self._every_n_train_steps = 1 if late else steps
            super().on_train_batch_end(trainer, pl_module, None, None, 0)
        finally:
            self._every_n_train_steps = steps
        if self._last_global_step_saved != before:
            self.written = time.monotonic()


def validation_is_due(trainer) -> bool:
    """Whether a validation follows the batch that was just trained on."""
    return trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)


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
        self.monitor = pl_module.monitor
        super().setup(trainer, pl_module, stage)

    def _should_skip_saving_checkpoint(self, trainer) -> bool:
        return self.monitor is None or super()._should_skip_saving_checkpoint(trainer)


class Record(Callback):
    """Puts into checkpoints the run's resolved config, the fingerprint of its texts, and that it had ended itself.

    A run that ended before its last step (a plateau) and was killed while it reported does not train on when resumed;
    another run that starts from its checkpoint does.
    """

    def __init__(self, config: dict, source: str | None = None):
        self.config, self.source, self.ended, self.running = config, source, False, {}

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        checkpoint["config"], checkpoint["ended"] = self.config, trainer.should_stop
        checkpoint["source"] = self.source

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        # Lightning counts one more when it goes on, for its own checkpoints are written before it counts; that of the
        # end of a run was written after it.
        loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.state_dict", {})
        if loop.get("_batches_that_stepped") == checkpoint["global_step"]:
            loop["_batches_that_stepped"] -= 1
        mine = Path(self.config["folder"]).absolute() / "checkpoints"
        self.ended = checkpoint.get("ended", False) and Path(trainer.ckpt_path).absolute().parent == mine

    def on_train_start(self, trainer, pl_module) -> None:
        trainer.should_stop = trainer.should_stop or self.ended

    def on_train_end(self, trainer, pl_module) -> None:  # before that of a callback that puts the average in its place
        if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):
            self.running = {name: p.detach().clone() for name, p in pl_module.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def going_on(self, pl_module):
        """Inside, the module has the weights that training would go on with, not the average of them."""
        own = {name: p for name, p in pl_module.named_parameters() if name in self.running}
        average = {name: p.detach().clone() for name, p in own.items()}
        for values in (self.running, average):
            for name, p in own.items():
                p.data.copy_(values[name])
            if values is self.running:
                yield


class RandomState(Callback):
    """Saves torch's random state, of every process, and restores it on the first batch of a resumed run.

    On the first batch, not earlier: building loaders draws numbers. Validation draws too (each new loader iterator
    does): so training goes on after it with the state from before it. Processes start with states of their own, for
    else they would all drop out the same channels.
    """

    def __init__(self):
        self.now = self.pending = self.saved = None

    def state_dict(self) -> dict:
        if self.now is None and self.saved:  # resumed behind its last step: nothing was drawn
            return {"processes": self.saved}
        mine = self.now or _random_state()
        if not (dist.is_available() and dist.is_initialized()):
            return {"processes": [mine]}
        states = [None] * dist.get_world_size()
        dist.all_gather_object(states, mine)
        return {"processes": states}

    def load_state_dict(self, state: dict) -> None:
        self.saved = state.get("processes", [state])

    def on_train_start(self, trainer, pl_module) -> None:
        if self.saved and len(self.saved) == trainer.world_size:
            self.pending = self.saved[trainer.global_rank]
        elif trainer.world_size > 1:
            torch.manual_seed(torch.initial_seed() + trainer.global_rank + trainer.global_step)
        self.saved = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.pending is not None:
            torch.set_rng_state(self.pending["cpu"].cpu())
            if torch.cuda.is_available() and self.pending["cuda"]:
                torch.cuda.set_rng_state(self.pending["cuda"][0].cpu())
            self.pending = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.now = _random_state()

    def on_validation_start(self, trainer, pl_module) -> None:
        self.pending = self.now


def _random_state() -> dict:
    """Of this process: the CPU's, and in a list the current card's where there is one."""
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}
