"""Windows with measured values, made as a lens stage needs them: files in the run folder, each written once."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from megactx.focus import moves
from megactx.focus.allocator import FocusAllocator
from megactx.focus.edit_labels import measure_values
from megactx.focus.label_files import save
from megactx.focus.lensnet import likeness
from megactx.focus.sampling import KINDS, draw, measured_share
from megactx.framework.bar import bar
from megactx.framework.files import IN_RUN, write
from megactx.framework.run.resume import differences
from megactx.lm.identity import of_net
from megactx.memory import MegaContextTree

from .work import Work

HELD = "held"
MADE = "made.json"  # of what the windows in a folder were made
OF_STAGE = ("horizon", "budgets", "allocator", "lensnet", "gistnet", "init")
OF_DATA = ("seed", "min_tokens", "max_tokens", "weights", "planted")


def sizes_ahead(stage, data: dict) -> tuple[int, float, float]:
    """P parameters of the base LM's layers, tokens of a text and entries of a window on average, for an estimate."""
    tokens = (data["min_tokens"] + (data["max_tokens"] or stage.base.max_positions)) / 2
    window = tokens * sum(stage.hparams.budgets) / len(stage.hparams.budgets)
    return Work.of_base(stage.base).body, tokens, window


def measuring_flops(stage, data: dict, windows: int) -> float:
    """About how many floating-point operations it takes to measure windows: a text, a window, its edits' own rows."""
    body, tokens, window = sizes_ahead(stage, data)
    return windows * 2 * body * (tokens + window + stage.hparams.windows["edits"] * window / 2)


def folder_of(folder: Path, what: int | str) -> Path:
    """Where the windows of a round, or the held-out ones, are."""
    return folder / (what if what == HELD else f"round_{what:02d}")


def ensure(stage, datamodule, folder: Path, what: int | str, count: int) -> list[Path]:
    """Measure windows of a round that are not there yet; -> the files of all of them.

    Window i is a function of (seed, round, i) and of the LensNet at the start of the round. So a run that was killed
    on the way makes the missing ones, and they are the same. A round is looked for on the disk once in a process: a
    window that goes missing later cannot be made again, for the LensNet has learned since.

    Args:
        stage: a ``LensStage``; the sizes of what is measured are added to its list ``measured``, and its
            ``window_files`` keeps the files of each round. ``gistnet_learns`` says that its gists are a matter of the
            step.
        what: the number of the round, or ``HELD``.
        count: windows.

    Raises:
        ValueError: windows of other settings, texts or models are there.
    """
    own = folder_of(folder, what)
    if (own, count) not in stage.window_files:
        _claim(stage, datamodule, folder)
        paths = [own / f"{index:05d}.safetensors" for index in range(count)]
        if missing := [index for index, path in enumerate(paths) if not path.exists()]:
            _measure(stage, datamodule, what, count, missing, paths)
        stage.window_files[own, count] = paths
    return stage.window_files[own, count]


def _claim(stage, datamodule, folder: Path) -> None:
    """Windows are what they were made of: those of a run that failed, or of another one, are taken for no others."""
    h, path = stage.hparams, folder / MADE
    now = {name: h[name] for name in OF_STAGE if name in h} | {name: getattr(datamodule, name) for name in OF_DATA}
    if stage.attention.kind != "plain":
        now["attention"] = asdict(stage.attention)
    now |= {"edits": h.windows["edits"], "texts": datamodule.source.fingerprint()}
    now["base LM"] = [stage.base_record[name] for name in ("embeddings", "weights")]
    if not stage.gistnet_learns:
        now["weights of the GistNet"] = of_net(stage.gistnet)
    now = json.loads(json.dumps(now))
    if not path.exists():
        write(path, json.dumps(now, indent=1), IN_RUN)
    elif changes := differences(json.loads(path.read_text(encoding="utf-8")), now):
        raise ValueError(
            f"stage.folder={folder}: the windows in it were measured otherwise: {'; '.join(changes)}. Remove it, or"
            " take another folder"
        )


def _measure(stage, datamodule, what: int | str, count: int, missing: list[int], paths: list[Path]) -> None:
    hparams, training = stage.hparams, stage.lens.training
    stage.lens.eval()
    held = datamodule.held_documents(count) if what == HELD else None
    shown = bar(f"measuring windows ({what})")(missing)
    with torch.no_grad(), torch.autocast(stage.device.type, torch.bfloat16, enabled=stage.half):
        for index in shown:
            rng = np.random.default_rng([datamodule.seed, 2**31 if what == HELD else what, index])
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            key = [2**31 if what == HELD else what, index]
            document = datamodule.training_document(key) if held is None else held[index % len(held)]
            kind, budget = KINDS[index % len(KINDS)], hparams.budgets[index % len(hparams.budgets)]
            _make(stage, document, kind, budget, generator, paths[index])
    stage.lens.train(training)


def _make(stage, document: dict, kind: str, fraction: float, generator, path: Path) -> None:
    cursor = document["cursor"]
    ids = document["ids"].to(stage.device)[None]
    tree = MegaContextTree.from_tokens(ids[:, :cursor], stage.gistnet, stage.base)
    allocator = FocusAllocator(**stage.hparams.allocator)
    try:
        context = draw(kind, tree, int(fraction * cursor), generator, stage.lens, allocator)
    except ValueError as error:
        raise ValueError(
            f"stage.budgets={list(stage.hparams.budgets)}: {fraction} of {cursor} tokens: {error}; take larger shares,"
            f" or a larger data.min_tokens"
        ) from error
    legal = moves(context, allocator.protected)
    edits = legal.edits(context)
    needed = torch.tensor(document.get("needed", []), device=edits.row.device)
    alike = likeness(context)
    promise = torch.cat([alike[legal.expand], alike[legal.leads]])
    promise[(edits.lod == 1) & torch.isin(edits.index, needed)] = torch.inf
    edits = measured_share(edits, stage.hparams.windows["edits"], generator, promise)
    values, _ = measure_values(stage.base, context, edits, ids[:, cursor:], stage.attention)
    stage.measured.append((cursor, ids.shape[1] - cursor, int(context.counts[0]), len(edits)))
    save(path, context, 0, legal, edits, values)
