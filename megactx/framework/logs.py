"""The CSV logger: ``metrics.csv`` in the run folder, continued by a resumed run."""

import csv
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger


class CSV(CSVLogger):
    """Lightning's CSV logger without version folders, and without deleting what is there.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str):
        super().__init__(save_dir=folder, name="", version="", flush_logs_every_n_steps=20)

    @property
    def experiment(self):
        if self._experiment is None:
            old = Path(self.log_dir) / "metrics.csv"
            aside = old.with_suffix(".csv.part")
            if old.exists():
                old.rename(aside)  # a fresh writer deletes metrics.csv
            writer = super().experiment
            if aside.exists():
                aside.rename(old)
                with old.open(newline="") as file:
                    writer.metrics_keys = next(csv.reader(file), [])
        return super().experiment

    def log_hyperparams(self, *args, **kwargs) -> None:
        """Nothing: ``config.yaml`` in the same folder has them."""
