"""What a lens stage measures when its training is over."""

from pathlib import Path

from megactx.data.files import Files
from megactx.evaluation.focus import measure_focus
from megactx.evaluation.focus_report import focus_report, summarise_focus
from megactx.evaluation.planted import measure_planted, summarise_planted
from megactx.focus.layout import check_shares
from megactx.framework.bar import bar


def report(stage, folder: Path, datamodule) -> None:
    """Every policy at every budget, on held-out documents and on ``evaluate.path``.

    Args:
        stage: a ``LensStage``.
        folder: of the run; what ``evaluate.path`` gives goes to ``other`` in it.
        datamodule: a ``WindowData``.
    """
    evaluate = stage.hparams.evaluate
    cases = datamodule.planted_cases(evaluate["planted"], datamodule.min_tokens) if evaluate["planted"] else []
    _report(stage, folder, documents_of_report(datamodule, evaluate), cases, "held-out documents")
    if evaluate["path"]:
        other = folder / "other"
        other.mkdir(exist_ok=True)
        documents = datamodule.other(Files(evaluate["path"]), evaluate["documents"], evaluate["tokens"])
        _report(stage, other, _some(documents, evaluate, evaluate["path"]), [], evaluate["path"])


def check_windows(settings, datamodule) -> None:
    """See that windows have room and that the report has documents: all that can be said before there are models.

    Args:
        settings: of a stage that reads windows.
        datamodule: a ``WindowData`` that is set up.

    Raises:
        ValueError: not so; it names the setting.
    """
    fewest, most, evaluate = datamodule.min_tokens, datamodule.max_tokens, settings["evaluate"]
    check_shares("stage.budgets", settings["budgets"], fewest, most, datamodule.block)
    cursors = [document["cursor"] for document in documents_of_report(datamodule, evaluate)]
    check_shares("stage.evaluate.budgets", evaluate["budgets"], min(cursors), max(cursors), datamodule.block)


def documents_of_report(datamodule, evaluate: dict) -> list[dict]:
    """Held-out documents that the end of a run measures; ``evaluate`` as of ``LensStage``.

    Raises:
        ValueError: there are none.
    """
    documents = datamodule.held_documents(evaluate["documents"], evaluate["tokens"])
    return _some(documents, evaluate, "held-out documents")


def _some(documents: list[dict], evaluate: dict, what: str) -> list[dict]:
    if not documents:
        raise ValueError(f"stage.evaluate.tokens={evaluate['tokens']}: none of {what} has so many tokens; take fewer")
    return documents


def _report(stage, folder: Path, documents: list[dict], cases: list[dict], what: str) -> None:
    evaluate = stage.hparams.evaluate
    parts = (stage.base, stage.gistnet, stage.lens, stage.hparams.allocator)
    shown = bar(f"measuring {what}")
    scores = measure_focus(*parts, documents, evaluate["budgets"], evaluate["oracle"], shown, stage.attention)
    numbers = summarise_focus(scores, stage.hparams.horizon)
    if cases:
        largest, shown = max(evaluate["budgets"]), bar("measuring planted facts")
        numbers["planted"] = summarise_planted(measure_planted(*parts, cases, largest, shown, stage.attention))
        numbers["planted"] |= {"budget": largest, "tokens": cases[0]["cursor"]}
    print(f"\nResult on {what}")
    made = focus_report(numbers)
    made.show()
    print(made.write(folder / "report", numbers))
