"""The loggers. All of them write in the run folder only, go on where a stopped run ended, and keep no secrets."""

import csv
import io
import os
import secrets
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from ..run.runfolder import write

REPORTED = ("*.json", "*.csv", "*.md", "*.png", "model/README.md")  # of a run folder, at its end


class CSV(CSVLogger):
    """Lightning's CSV logger, ``metrics.csv``, without version folders, and without deleting what is there.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str):
        # Every row at once: what is still in memory when a run is killed would be missing in the resumed one.
        super().__init__(save_dir=folder, name="", version="", flush_logs_every_n_steps=1)

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
            writer._rewrite_with_new_header = partial(self._rewrite, old)
        return super().experiment

    @rank_zero_only
    def rewind(self, steps: int) -> None:
        """Drop the rows of later steps than the first ``steps``, and one that a kill has cut: they will be repeated."""
        path = Path(self.log_dir) / "metrics.csv"
        if path.exists() and (names := self.experiment.metrics_keys):
            self._rewrite(path, names, lambda row: int(row["step"]) < steps)

    @staticmethod
    def _rewrite(path: Path, names: list[str], keep: Callable[[dict], bool] = lambda row: True) -> None:
        """Write the file anew with these columns, whole or not at all."""
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = lines if lines[-1:] and lines[-1].endswith("\n") else lines[:-1]
        rows = [row for row in csv.DictReader(whole) if keep(row)]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
        write(path, text.getvalue())

    def log_hyperparams(self, *args, **kwargs) -> None:
        """Nothing: ``config.yaml`` in the same folder has them."""


class TensorBoard(TensorBoardLogger):
    """Events in ``tensorboard/`` of the run folder; a resumed run adds a file that continues the same curves.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str):
        super().__init__(save_dir=folder, name="tensorboard", version="")
        self.config = Path(folder) / "config.yaml"

    @rank_zero_only
    def log_hyperparams(self, *args, **kwargs) -> None:
        """Show the run's ``config.yaml``: all settings, where a stage knows its own only, and no secret."""
        self.experiment.add_text("config", f"```yaml\n{self.config.read_text()}\n```")

    @rank_zero_only
    def save(self) -> None:
        """Nothing: the events are flushed as they come, the settings are in ``config.yaml``."""


class Wandb(WandbLogger):
    """Weights & Biases, one run per run folder; a resumed run keeps its id, which ``wandb_id`` in the folder holds.

    The command line, the code and the output are not recorded: the run folder has them, without secrets.

    Args:
        folder: the run folder; wandb's own files and logs go to ``wandb/`` in it.
        project: the project that the run belongs to.
        group: the runs that belong together.
        offline: write files that ``wandb sync`` uploads later; else send while training, with the key of
            ``wandb login`` or ``WANDB_API_KEY``.
    """

    def __init__(self, folder: str, project: str, group: str | None = None, offline: bool = True):
        import wandb

        os.environ["WANDB_CACHE_DIR"] = str(Path(folder).absolute() / "wandb")  # its service logs to ~/.cache otherwise
        super().__init__(
            name=Path(folder).name,
            save_dir=folder,
            project=project,
            group=group,
            id=_id(Path(folder)),
            resume="allow",
            offline=offline,
            settings=wandb.Settings(
                silent=offline, console="off", save_code=False, disable_git=True, x_disable_meta=True
            ),
        )
        if wandb.run is not None and wandb.run.id != self._id:  # of the stage before: Lightning would go on in it
            wandb.finish()
        self._wandb_init.pop("anonymous", None)  # Lightning hands it over, wandb says that it has no effect
        self.config = Path(folder) / "config.yaml"

    @rank_zero_only
    def log_hyperparams(self, *args, **kwargs) -> None:
        """Show the run's ``config.yaml``: all settings, where a stage knows its own only, and no secret."""
        from omegaconf import OmegaConf

        settings = OmegaConf.to_container(OmegaConf.load(self.config))
        self.experiment.config.update(settings, allow_val_change=True)

    @rank_zero_only
    def keep(self, folder: Path) -> None:
        """Add what the run has reported: its files, and the long table as one of Weights & Biases' own.

        ``megactx.evaluation.page`` makes the report of them again.
        """
        import wandb

        own = Path(self.experiment.dir)  # what is saved from elsewhere would be a link, and gone when the folder moves
        for path in sorted(path for name in REPORTED for path in folder.glob(name)):
            copy = own / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            self.experiment.save(str(copy), base_path=str(own), policy="now")
        for path in sorted(folder.glob("*.csv")):
            if path.name != "metrics.csv":  # which are curves there
                with path.open(newline="", encoding="utf-8") as file:
                    columns, *rows = csv.reader(file)
                table = wandb.Table(columns=columns, data=rows)
                self.experiment.log({f"report/{path.stem}": table})


def _id(folder: Path) -> str | None:
    """The id of the run in a folder, made once."""
    path = folder / "wandb_id"
    if rank_zero_only.rank == 0 and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write(path, secrets.token_hex(4))
    return path.read_text() if path.exists() else None
