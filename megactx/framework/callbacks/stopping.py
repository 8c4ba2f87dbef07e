"""What stops a run: a loss that is no number, Ctrl-C, SIGTERM, with which systems end a process, a closed terminal."""

import contextlib
import logging
import signal
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

from ..command_line import leave_terminal, unclaimed
from ..errors import Interrupted, RunFailed
from .checkpoints import validation_is_due

log = logging.getLogger(__name__)


class StopOnBadLoss(Callback):
    """Ends a run before a NaN or infinite loss or gradient reaches the weights."""

    def __init__(self):
        self.good = None

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        finite = torch.isfinite(loss.detach()).all()
        self.good = finite if self.good is None else self.good & finite

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        # With a gradient scaler (16-mixed) an infinite gradient is an ordinary event that it skips.
        if grads and trainer.scaler is None:
            self.good = self.good & torch.isfinite(torch.nn.utils.get_total_norm(grads)).to(self.good.device)
        good, self.good = bool(self.good), None  # the one host sync of a step
        if not trainer.strategy.reduce_boolean_decision(good, all=True):  # all processes stop, or none does
            rates = [f"stage.{name}" for name in pl_module.hparams if name.split("_")[-1] == "lr" and "min" not in name]
            raise RunFailed(
                f"the loss or its gradient is NaN or infinite at step {trainer.global_step}; the step was not taken."
                f" Lower {', '.join(rates) or 'the learning rate'} or raise preset.warmup. The last checkpoint is kept:"
                f" {_last(trainer) or 'none was saved yet'}"
            )


class StopOnInterrupt(Callback):
    """Ctrl-C, SIGTERM or SIGHUP ends a run after the step that is under way, with a checkpoint from which it goes on
    exactly.

    Where that step's validation is due or under way, it is finished first. A second one stops at once. It stands behind
    the callbacks whose conclusions the checkpoint must hold.
    """

    def __init__(self, folder: Path):
        self.path = Path(folder) / "checkpoints" / "last.ckpt"
        self.asked = self.saved = False
        self._before: dict = {}
        # A launcher that has a handler of its own does with SIGTERM what its queue wants; nohup ignores SIGHUP.
        self._signals = (signal.SIGINT, *unclaimed())

    def on_train_start(self, trainer, pl_module) -> None:  # by then Lightning has noted the handlers that it restores
        with contextlib.suppress(ValueError):  # not in the main thread: then there are no signals either
            for number in self._signals:
                self._before[number] = signal.signal(number, self._ask)

    def _ask(self, number, frame) -> None:
        self.asked = True
        leave_terminal()
        log.info("Stopping after this step. Ctrl-C again stops at once.")
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        between = (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % trainer.accumulate_grad_batches
        if not between and not validation_is_due(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer, pl_module) -> None:
        self._save(trainer)

    def _save(self, trainer) -> None:
        if trainer.strategy.reduce_boolean_decision(self.asked, all=False):  # any process may have been asked
            if trainer.checkpoint_callback is not None and not trainer.fast_dev_run:
                trainer.save_checkpoint(self.path)
            self.saved = True

    # Not where it was saved: only now is the step's row in the log.
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.saved:
            raise Interrupted(f"interrupted at step {trainer.global_step}")

    def on_train_end(self, trainer, pl_module) -> None:
        self._restore()
        if self.saved:
            raise Interrupted(f"interrupted at step {trainer.global_step}, the last one")

    def on_exception(self, trainer, pl_module, exception) -> None:
        self._restore()


def _last(trainer) -> str:
    saved = [callback for callback in trainer.checkpoint_callbacks if hasattr(callback, "last_model_path")]
    paths = [callback.last_model_path for callback in saved] + [callback.best_model_path for callback in saved]
    return next(filter(None, paths), "")
