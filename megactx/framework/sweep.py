"""Sweeps (``-m``) that go on where they stopped and hide no failure.

Every job has a fixed folder, named by its overrides, with an ``outcome.json``. A second start skips what is done and
resumes the rest; at the end all jobs stand in one table.
"""

import json
import os
import uuid
from pathlib import Path

from hydra.experimental.callback import Callback

from .errors import DONE
from .runfolder import write

_ID = "MEGACTX_SWEEP"  # reaches the jobs of launchers that start processes
_folder: Path | None = None


class RememberFolder(Callback):
    """Notes the folder of the sweep that starts."""

    def on_multirun_start(self, config, **kwargs) -> None:
        global _folder
        _folder = Path(config.hydra.sweep.dir)
        os.environ[_ID] = uuid.uuid4().hex

    def on_multirun_end(self, config, **kwargs) -> None:
        # Hydra keeps the overrides there as they were given, secrets included.
        (Path(config.hydra.sweep.dir) / "multirun.yaml").unlink(missing_ok=True)


def note(folder: Path, overrides: list[str], state: str, code: int | None = None, message: str = "") -> None:
    """Write the outcome of a job, or that it has started (``code`` None)."""
    folder.mkdir(parents=True, exist_ok=True)
    outcome = dict(sweep=os.environ.get(_ID), overrides=overrides, state=state, code=code, message=message)
    write(folder / "outcome.json", json.dumps(outcome, indent=1))


def summary() -> int:
    """Print the table of the jobs of this sweep; -> 0, or the code of the first job that is not done."""
    from rich.console import Console
    from rich.table import Table

    if _folder is None:
        return DONE
    found = [(path.parent, json.loads(path.read_text())) for path in sorted(_folder.glob("*/outcome.json"))]
    found = [(folder, outcome) for folder, outcome in found if outcome["sweep"] == os.environ.get(_ID)]
    table = Table("job", "state", "code", "message", title=f"Sweep in {_folder}")
    code = DONE
    for folder, outcome in found:
        first = (outcome["message"] or "").splitlines()
        table.add_row(folder.name, outcome["state"], str(outcome["code"]), first[0] if first else "")
        if outcome["code"] != DONE:
            code = code or outcome["code"] or 3
    Console().print(table)
    return code
