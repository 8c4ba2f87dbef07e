"""What a gist stage measures when its training is over: tables, pictures and scores in the run folder."""

from functools import partial
from pathlib import Path

import torch
from torch.utils.data import default_convert

from megactx.data.files import Files
from megactx.evaluation.history import measure_history, segments
from megactx.evaluation.measure import measure, untrained
from megactx.evaluation.passages import DISTANCES, measure_copies, measure_level
from megactx.evaluation.plots import plot_run
from megactx.evaluation.reconstruction import reconstruction, train_decoder
from megactx.evaluation.report import in_short, report_of
from megactx.evaluation.summary import summarise
from megactx.evaluation.validation import SpaceMetrics
from megactx.framework.bar import bar


def report(stage, folder: Path, datamodule) -> None:
    """Report on held-out documents and on ``evaluate.path``, as the stage's ``evaluate`` says.

    Args:
        stage: a ``GistStage``.
        folder: of the run; what ``evaluate.path`` gives goes to ``other`` in it.
        datamodule: a ``SpanData``.
    """
    evaluate = stage.hparams.evaluate
    decoder = None
    if steps := evaluate["reconstruction"]:
        training = (default_convert(datamodule.training[index]) for index in range(steps))
        decoder = train_decoder(stage.base, stage.main, training)
    rest = (folder / "metrics.csv", decoder, datamodule.weights)
    _report(stage, folder, datamodule.evaluation_documents, "held-out documents", *rest)
    if evaluate["path"]:
        other = folder / "other"
        other.mkdir(exist_ok=True)
        _report(stage, other, partial(datamodule.held_out, Files(evaluate["path"])), evaluate["path"], *rest)


def _report(stage, folder: Path, documents, what: str, curve: Path, decoder, weights: dict) -> None:
    evaluate, horizon = stage.hparams.evaluate, stage.hparams.horizon
    batches, every = documents(evaluate["blocks"]), documents(None)
    extra = {"weights": weights}
    with torch.autocast(stage.device.type, torch.bfloat16, enabled=stage.base.model.dtype == torch.bfloat16):
        nets = (stage.base, stage.nets)
        settings = {
            "with_controls": evaluate["controls"],
            "progress": bar(f"measuring {what}"),
            "attention": stage.attention,
        }
        scores = measure(*nets, batches, horizon, **settings)
        if evaluate["copies"]:
            extra["copies"] = measure_copies(*nets, every, blocks=evaluate["copies"], **settings)
        if evaluate["level2"] and stage.main.makes_levels:
            with_levels = {name: net for name, net in stage.nets.items() if net.makes_levels}
            extra["level2"] = measure_level(
                stage.base, with_levels, every, horizon, blocks=evaluate["level2"], **settings
            )
        if evaluate["history"]:
            extra["history"] = _history(stage, every, evaluate["history"], settings)
        geometry = _geometry(stage, batches) if stage.main.makes_one_vector else {}
    if decoder:
        geometry |= reconstruction(stage.base, stage.main, decoder, batches)
    scores.save(folder / "scores")
    for name in ("level2", "history"):
        if extra.get(name):
            extra[name].save(folder / f"scores_{name}")
    numbers = summarise(scores, next(iter(stage.nets)), targets=stage.hparams.targets, geometry=geometry, **extra)
    numbers["flops_per_block"] = {name: net.flops_per_block(stage.base) for name, net in stage.nets.items()}
    numbers["notes"] += _not_measured(numbers, stage)
    if stage.attention.kind != "plain":
        numbers["notes"].append(
            f"read under {stage.attention}: blocks are live ones, those of the newest tokens of each document."
        )
    if without := [name for name, net in stage.nets.items() if not net.makes_vectors]:
        numbers["notes"].append(
            f"{', '.join(without)}: keys and values have no output row, so at h = 0 they count as dropped; against"
            " vectors compare the bands from h = 1 on."
        )
    if extra.get("level2") and (without := [name for name, net in stage.nets.items() if not net.makes_levels]):
        numbers["notes"].append(f"{', '.join(without)}: no gists of gists, so no row in their table.")
    curve = curve if curve.exists() else None
    made = report_of(numbers, lambda path: plot_run(path, scores, curve, numbers["subject"]))
    print(f"\nResult on {what}")
    made.show()
    print(made.write(folder / "report", numbers))
    steps, most = f"{stage.global_step:,}", stage.hparams.max_steps
    steps += " steps" if stage.global_step >= most else f" of at most {most:,} steps"
    print(f"In short, on {what} after {steps}: {in_short(numbers)}")


def _not_measured(numbers: dict, stage) -> list[str]:
    """What a reader may look for in vain, and the setting that brings it."""
    notes, main = [], stage.main
    tokens = "tokens" if stage.attention.kind == "plain" else f"live tokens (attention.live={stage.attention.live})"
    missing = [str(distance) for distance in DISTANCES if str(distance) not in numbers["copies"]]
    if missing:
        why = f"evaluate.copies is 0, or no document has 3 K + distance {tokens}."
        notes.append(f"copy recovery was not measured at {', '.join(missing)} tokens: {why}")
    if not numbers["level2"]:
        why = f"evaluate.level2 is 0, or no document has 2 K^2 + H {tokens}, 2,048 + H where K = 32."
        why = why if main.slots == 1 else f"gistnet.slots is {main.slots}, and several vectors have no gist of gists."
        notes.append(f"hierarchical consistency (dNLL of a gist of gists) was not measured: {why}")
    return notes


def _history(stage, batches: list[dict], count: int, settings: dict):
    """Scores of segments behind compressed histories; ``None`` where no document is long enough."""
    sizes = dict(zip(("segment", "recency"), stage.windows, strict=True))
    documents = segments(batches, stage.main.block_size, count, **sizes)
    if not documents:
        return None
    nets = dict(stage.nets)
    if settings["with_controls"]:
        nets |= untrained(stage.base, stage.main.block_size, stage.main.position)
    return measure_history(stage.base, nets, documents, **sizes, progress=settings["progress"])


def _geometry(stage, batches: list[dict]) -> dict:
    metric = SpaceMetrics(stage.base.width).to(stage.device)
    for batch in batches:
        metric.update(stage.base, stage.main, batch)
    return {name: value.item() for name, value in metric.compute().items()}
