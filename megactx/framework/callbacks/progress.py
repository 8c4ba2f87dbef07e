"""The progress bar: rich in a terminal, a line every few percent elsewhere."""

import sys
import time

from lightning.pytorch.callbacks import ProgressBar

from .checkpoints import validation_is_due


class Progress(ProgressBar):
    """Shows steps, speed, time left and what the stage logs with ``prog_bar=True``.

    Args:
        every: percent between two lines where stdout is not a terminal.
    """

    def __init__(self, every: int = 5):
        super().__init__()
        if not 0 < every <= 100:
            raise ValueError(f"callbacks.progress.every={every}: allowed is 1 to 100 percent")
        self.every, self.bar, self.enabled = every, None, True

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer, pl_module) -> None:
        self.start, self.first = time.monotonic(), trainer.global_step
        self.shown = self._percent(trainer) // self.every
        self.drawn = 0.0
        if self.enabled and sys.stdout.isatty():
            self.bar = self._open()
            self.task = self.bar.add_task(
                "training", total=trainer.max_steps, completed=trainer.global_step, metrics=""
            )

    @staticmethod
    def _open():
        from rich import progress

        bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[metrics]}"),
        )
        bar.start()
        return bar

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self.bar is not None:
            now = time.monotonic()
            if now - self.drawn > 0.5:  # reading the metrics waits for the device
                self.drawn = now
                self.bar.update(self.task, metrics=self._metrics(trainer))
            self.bar.update(self.task, completed=trainer.global_step)
        elif not validation_is_due(trainer):  # then the line comes behind it, with what it found
            self._tell(trainer)

    def _tell(self, trainer) -> None:
        if self.enabled and self.bar is None and self._percent(trainer) // self.every > self.shown:
            self.shown = self._percent(trainer) // self.every
            print(self._line(trainer), flush=True)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description=f"validating {batch_idx + 1}/{sum(trainer.num_val_batches)}")

    def on_validation_end(self, trainer, pl_module) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description="training", metrics=self._metrics(trainer))
        elif not trainer.sanity_checking:
            self._tell(trainer)

    def on_train_end(self, trainer, pl_module) -> None:
        self._close()

    def on_exception(self, trainer, pl_module, exception) -> None:
        self._close()

    def teardown(self, trainer, pl_module, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    @staticmethod
    def _percent(trainer) -> int:
        return 100 * trainer.global_step // max(1, trainer.max_steps)

    @staticmethod
    def _metrics(trainer) -> str:
        return "  ".join(f"{name} {value:.3f}" for name, value in trainer.progress_bar_metrics.items())

    def _line(self, trainer) -> str:
        done = trainer.global_step - self.first
        seconds = time.monotonic() - self.start
        left = seconds / max(1, done) * (trainer.max_steps - trainer.global_step)
        return (
            f"step {trainer.global_step}/{trainer.max_steps} ({self._percent(trainer)} %)  {_clock(seconds)} gone,"
            f" {_clock(left)} left  {self._metrics(trainer)}"
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
