"""Stage ``prediction``: readouts of a frozen base LM learn to foretell the next gist (method: MegaPrediction).

The base LM reads a text once; what the readout needs of it, a state and a gist per block, is kept. So all further steps
over the text cost next to nothing.
"""

import logging
from collections import OrderedDict
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from megactx.evaluation.prediction import Text, measure, report
from megactx.framework.bar import bar
from megactx.framework.config.types import Count, NonNegative, Share, Whole
from megactx.lm.prefill_cache import PrefillCache
from megactx.memory.prediction import Example, Readout, example_of, info_nce
from megactx.parts.write import save_prediction

from .gist import Prefills
from .stage import BaseSettings, GistReaderStage, portable, portable_part
from .work import Work

log = logging.getLogger(__name__)


class ReadoutSettings(TypedDict):
    """Keyword arguments of ``Readout`` other than the width."""

    head: str
    levels: Count


class Evaluate(TypedDict):
    """Of the end-of-run report."""

    documents: Count


class PredictionStage(GistReaderStage):
    """A readout, and the control that learns beside it on the same texts.

    Args:
        base: ``name`` and ``dtype`` of the base LM.
        gistnet: whose gists are foretold: ``asset:NAME``, a folder, a run or a checkpoint.
        readout: keyword arguments of ``Readout``.
        level2_weight: of the loss at level 2, beside 1 for level 1.
        kept: texts whose states and gists are kept in memory, the newest.
        prefills: of ``PrefillCache``; with gigabytes of 0 the base LM reads each text anew.
        lr, min_lr, weight_decay, warmup, max_steps: of AdamW and its cosine.
        evaluate: ``documents``: held-out ones in the end-of-run report.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    monitor = "val/loss"
    takes = {"base": "base.name", "gistnet": "stage.gistnet"}
    reports_best = True
    kept_layers = ()
    shorter = "preset.steps=N, data.max_tokens=N and fewer texts make it short"

    def __init__(
        self,
        base: BaseSettings,
        gistnet: str,
        readout: ReadoutSettings,
        level2_weight: Share,
        kept: Count,
        prefills: Prefills,
        lr: NonNegative,
        min_lr: NonNegative,
        weight_decay: NonNegative,
        warmup: Whole,
        max_steps: Count,
        evaluate: Evaluate,
    ):
        super().__init__()
        base, gistnet = base | {"name": portable(base["name"])}, portable_part(gistnet)
        self.save_hyperparameters()
        self.check_settings()
        self.take_models(base, gistnet)
        self.readout = Readout(self.base.width, **readout)
        self.prefills: PrefillCache | None = None
        self.read: OrderedDict[bytes, Example] = OrderedDict()

    def groups(self) -> list[dict]:
        h = self.hparams
        return [{"params": list(self.readout.parameters()), "lr": h.lr, "weight_decay": h.weight_decay}]

    def example(self, ids: Tensor) -> Example:
        """Of a text ids [T]; read anew where it is not kept."""
        key = ids.cpu().numpy().tobytes()
        if key not in self.read:
            states = self.states(ids) if self.training and self.hparams.prefills["gigabytes"] else None
            self.read[key] = example_of(self.base, self.gistnet, ids, self.readout.levels, states).half()
            if len(self.read) > self.hparams.kept:
                self.read.popitem(last=False)
        return self.read[key].float()  # the same bits whether it was kept or not

    def states(self, ids: Tensor) -> Tensor:
        """Final hidden states [T, D] of a text, from the disk where it was read before."""
        self.prefills = self.prefills or PrefillCache(self.base, **self.hparams.prefills)
        return self.prefills(ids[None], torch.tensor([len(ids)])).hidden[0]

    def examples(self, batch: dict) -> list[Example]:
        return [self.example(ids[:n]) for ids, n in zip(batch["ids"], batch["lengths"].tolist(), strict=True)]

    def losses(self, examples: list[Example]) -> Tensor:
        """InfoNCE of the readout and of its control, [2]; over the levels by their weights."""
        losses = info_nce(self.readout, examples)
        if self.readout.levels > 1:
            losses = losses + self.hparams.level2_weight * info_nce(self.readout, examples, 2)
        return losses

    def training_step(self, batch: dict) -> Tensor:
        examples = self.examples(batch)
        for example in examples:
            self.readout.count(example)
        losses = self.losses(examples)
        self.log("train/loss", losses[0].detach(), prog_bar=True)
        self.log("train/control", losses[1].detach())
        return losses.sum()

    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # readout, control, documents

    def validation_step(self, batch: dict, batch_index: int) -> None:
        losses = self.losses(self.examples(batch))
        self.sums += torch.cat([losses, losses.new_ones(1)]).double()

    def on_validation_epoch_end(self) -> None:
        own, control, count = self.trainer.strategy.reduce(self.sums, reduce_op="sum")
        self.log("val/loss", own / count, prog_bar=True)
        self.log("val/control", control / count)

    def flops(self, batch: dict) -> Tensor | float:
        """The pass of the base LM over texts that were not kept is not told apart: as if all were read anew."""
        work, tokens = Work.of_base(self.base), batch["lengths"].double()
        return 2 * work.body * tokens.sum() + work.attention * tokens.square().sum()

    @torch.no_grad()
    def finish(self, folder: Path, datamodule) -> None:
        """Ranks on held-out documents beside the controls, the readout as a folder, and the next command."""
        self.eval()
        documents = datamodule.evaluation_documents(None)[: self.hparams.evaluate["documents"]]
        texts = []
        for batch in bar("reading held-out documents")(documents):
            texts.append(Text(self.example(batch["ids"][0].to(self.device)), batch["domain"][0]))
        told = report(measure(self.readout, texts), "What the next gist is", {}, len(texts))
        told.show()
        print(told.write(folder / "report"))
        save_prediction(self.readout, dict(self.hparams.readout), self.gistnet, folder / "prediction", str(folder.name))
        print(f"Next: python -m megactx.studies.prediction {folder} --path TEXTS")
