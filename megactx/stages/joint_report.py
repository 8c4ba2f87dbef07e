"""What a joint stage measures when its training is over."""

import json
import math
from pathlib import Path

from torch import Tensor

from megactx.evaluation.table import without_nan
from megactx.framework.files import replacing
from megactx.lm import BaseLM
from megactx.lm.adapters import adapters_of
from megactx.lm.chunked_head import nll

from . import lens_report


def report(stage, folder: Path, datamodule) -> None:
    """The tables of a lens stage, and ``base.json``: what became of the base LM's own perplexity.

    Args:
        stage: a ``JointStage``.
        folder: of the run.
        datamodule: a ``JointData``.
    """
    lens_report.report(stage, folder, datamodule)
    documents = datamodule.held_documents(stage.hparams.evaluate["documents"])
    numbers = {"steps": stage.global_step, "tokens": int(stage.tokens), "train_base": stage.train_base}
    numbers |= lost(stage, documents)
    with replacing(folder / "base.json") as part:
        part.write_text(json.dumps(without_nan(numbers), indent=1, allow_nan=False))
    print(in_words(numbers))


def lost(stage, documents: list[dict]) -> dict:
    """Adapter parameters, and the base LM's plain NLL and perplexity before and after, over whole documents.

    NLL in nats per token, means over documents.
    """
    with stage.original() as original:
        before = [plain_nll(original, document["ids"].to(stage.device)) for document in documents]
    after = [plain_nll(stage.base, document["ids"].to(stage.device)) for document in documents]
    first, now = (sum(values) / len(values) for values in (before, after))
    return {
        "adapter_parameters": sum(p.numel() for p in adapters_of(stage.base).values()),
        "documents": len(documents),
        "nll_before": first,
        "nll_after": now,
        "perplexity_before": math.exp(first),
        "perplexity_after": math.exp(now),
    }


def plain_nll(base: BaseLM, ids: Tensor) -> float:
    """NLL of ids [T], from the second one on, under a plain causal pass: the mean, in nats per token."""
    return float(nll(base, base(base.embed(ids[None, :-1]), None)[0], ids[1:]).mean())


def in_words(numbers: dict) -> str:
    """One line of ``lost``."""
    return (
        f"Base LM: {numbers['adapter_parameters']:,} adapter parameters; its own perplexity on {numbers['documents']}"
        f" documents is {numbers['perplexity_after']:.3f}, it was {numbers['perplexity_before']:.3f}"
    )
