"""What a lens stage measures when its training is over."""

import sys
from functools import partial
from pathlib import Path

from rich.progress import track

from megactx.data.files import Files
from megactx.evaluation.focus import measure_focus
from megactx.evaluation.focus_report import report_focus, summarise_focus


def report(stage, folder: Path, datamodule) -> None:
    """Every policy at every budget, on held-out documents and on ``evaluate.path``.

    Args:
        stage: a ``LensStage``.
        folder: of the run; what ``evaluate.path`` gives goes to ``other`` in it.
        datamodule: a ``WindowData``.
    """
    asked = stage.hparams.evaluate
    _report(stage, folder, datamodule.held_documents(asked["documents"], asked["tokens"]), "held-out documents")
    if asked["path"]:
        other = folder / "other"
        other.mkdir(exist_ok=True)
        documents = datamodule.other(Files(asked["path"]), asked["documents"], asked["tokens"])
        _report(stage, other, documents, asked["path"])


def _report(stage, folder: Path, documents: list[dict], what: str) -> None:
    asked = stage.hparams.evaluate
    if not documents:
        raise ValueError(f"stage.evaluate.tokens={asked['tokens']}: none of {what} has so many tokens; take fewer")
    scores = measure_focus(
        stage.base,
        stage.gistnet,
        stage.lens,
        stage.hparams.allocator,
        documents,
        asked["budgets"],
        asked["oracle"],
        progress=partial(track, description=f"measuring {what}", disable=not sys.stdout.isatty()),
    )
    print(f"\nResult on {what}")
    report_focus(folder, summarise_focus(scores, stage.hparams.horizon))
    print(f"Tables: {folder / 'report.md'}   picture: {folder / 'report.png'}")
