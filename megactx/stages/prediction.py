"""Stage ``prediction``: readouts of a base LM learn to foretell the next gist (method: MegaPrediction).

A frozen base LM reads a text once; what the readout needs of it, a state and a gist per block, is kept. So all further
steps over the text cost next to nothing. A base that learns too, by LoRA or from random weights, reads it at every
step, and learns its next tokens beside the next gist. Gists are always those of the base LM as it was.
"""

import logging
import math
from collections import OrderedDict
from pathlib import Path
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.evaluation.prediction import READOUT, Text, measure, report
from megactx.evaluation.table import OVERALL
from megactx.framework.bar import bar
from megactx.framework.config.types import Count, NonNegative, Share, Whole
from megactx.framework.optimizers import floor_of, warmup_cosine
from megactx.lm import BaseLM
from megactx.lm.adapters import adapt, adapters_of, switched_off
from megactx.lm.prefill_cache import PrefillCache
from megactx.memory.prediction import CONTROL, Example, Readout, example_of, info_nce
from megactx.parts.write import save_prediction

from .gist import Prefills
from .joint import Lora
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
        train_base: ``frozen``, ``lora``: adapters of the base LM learn, or ``scratch``: another base LM of the same
            config reads in its place, from random weights. The last two learn the next tokens too.
        lora: ``rank``, ``layers`` and ``embeddings``, see ``adapt``.
        weight: of the loss of the readout where a base learns, beside 1 for the NLL of a token; 0 is the control, of
            which the base LM learns nothing from the readout.
        base_lr: of what learns of a base.
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
        train_base: Literal["frozen", "lora", "scratch"],
        lora: Lora,
        weight: NonNegative,
        base_lr: NonNegative,
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
        self.train_base, self.reader = train_base, None
        if train_base == "lora":
            adapt(self.base, **lora)
            for parameter in adapters_of(self.base).values():
                parameter.requires_grad_(True)
        if train_base == "scratch":
            self.reader = BaseLM.from_config(self.base.config.to_dict(), self.base.tokenizer)
        self.readout = Readout(self.base.width, **readout)
        self.prefills: PrefillCache | None = None
        self.read: OrderedDict[bytes, Example] = OrderedDict()

    def session_parts(self):
        own = {} if self.reader else {"prediction": self.readout}  # which is of the reader's states
        return {"gistnet": self.gistnet} | own

    def set_dtype(self, dtype: torch.dtype) -> None:
        super().set_dtype(dtype)
        for parameter in adapters_of(self.base).values():  # what learns stays in fp32
            parameter.data = parameter.data.float()

    def kept_of_base(self) -> set[str]:
        return set(adapters_of(self.base))

    def groups(self) -> list[dict]:
        h = self.hparams
        groups = [{"params": list(self.readout.parameters()), "lr": h.lr, "weight_decay": h.weight_decay}]
        learning = [*(self.reader.parameters() if self.reader else adapters_of(self.base).values())]
        return groups + [{"params": learning, "lr": h.base_lr, "weight_decay": 0.0}] * bool(learning)

    def factor(self, step: int, group: dict) -> float:
        h = self.hparams
        return warmup_cosine(step, h.warmup, h.max_steps, floor_of(h.min_lr, group["lr"]))

    def read_by(self, ids: Tensor) -> tuple[Example, Tensor | None]:
        """A text ids [T] -> states of whoever reads it and gists; and the reader's NLL of its tokens [T - 1], where it
        learns."""
        example = self.example(ids)
        if self.train_base == "frozen":
            return example, None
        reader, levels = self.reader or self.base, []
        hidden = reader(reader.embed(ids[None]), None)[0]
        states = hidden if self.hparams.weight else hidden.detach()
        for lod, (_, gists) in enumerate(example.levels, start=1):
            width = self.gistnet.block_size**lod
            levels.append((states[width - 1 : len(gists) * width : width].float(), gists))
        cost = F.cross_entropy(reader.logits(hidden[:-1]).float(), ids[1:], reduction="none")
        return Example(tuple(levels)), cost

    def example(self, ids: Tensor) -> Example:
        """Of a text ids [T] as the frozen base LM reads it; read anew where it is not kept."""
        key = ids.cpu().numpy().tobytes()
        if key not in self.read:
            states = self.states(ids) if self.training and self.hparams.prefills["gigabytes"] else None
            with switched_off(self.base) as base:
                self.read[key] = example_of(base, self.gistnet, ids, self.readout.levels, states).half()
            if len(self.read) > self.hparams.kept:
                self.read.popitem(last=False)
        return self.read[key].float()  # the same bits whether it was kept or not

    def states(self, ids: Tensor) -> Tensor:
        """Final hidden states [T, D] of a text, from the disk where it was read before."""
        self.prefills = self.prefills or PrefillCache(self.base, **self.hparams.prefills)
        return self.prefills(ids[None], torch.tensor([len(ids)])).hidden[0]

    def examples(self, batch: dict) -> tuple[list[Example], Tensor | None]:
        """Of each text of a batch, and the mean NLL of a token, where the reader learns."""
        texts = zip(batch["ids"], batch["lengths"].tolist(), strict=True)
        examples, costs = zip(*(self.read_by(ids[:n]) for ids, n in texts), strict=True)
        return list(examples), None if costs[0] is None else torch.cat(costs).mean()

    def losses(self, examples: list[Example]) -> Tensor:
        """InfoNCE of the readout and of its control, [2]; over the levels by their weights."""
        losses = info_nce(self.readout, examples)
        if self.readout.levels > 1:
            losses = losses + self.hparams.level2_weight * info_nce(self.readout, examples, 2)
        return losses

    def training_step(self, batch: dict) -> Tensor:
        examples, cost = self.examples(batch)
        for example in examples:
            self.readout.count(example)
        losses = self.losses(examples)
        self.log("train/loss", losses[0].detach(), prog_bar=True)
        self.log("train/control", losses[1].detach())
        if cost is None:
            return losses.sum()
        self.log("train/nll", cost.detach())
        return cost + (self.hparams.weight or 1.0) * losses[0] + losses[1]

    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.device)  # readout, control, NLL, documents
        self.texts: list[Text] = []

    def validation_step(self, batch: dict, batch_index: int) -> None:
        examples, cost = self.examples(batch)
        losses = self.losses(examples)
        self.texts += [Text(*pair) for pair in zip(examples, batch["domain"], strict=True)]
        self.sums += torch.stack(
            [*losses, losses.new_zeros(()) if cost is None else cost, losses.new_ones(())]
        ).double()

    def on_validation_epoch_end(self) -> None:
        own, control, cost, count = self.trainer.strategy.reduce(self.sums, reduce_op="sum")
        self.log("val/loss", own / count, prog_bar=True)
        self.log("val/control", control / count)
        if self.train_base != "frozen":
            self.log("val/nll", cost / count)
        ranks = measure(self.readout, self.texts)
        for name, carrier in (("mrr", READOUT), ("mrr_map", CONTROL)):
            value = ranks.point(metric="mrr", carrier=carrier, domain=OVERALL, span="level 1")
            if not math.isnan(value):  # no text of this process has two gists
                self.log(f"val/{name}", value, sync_dist=True)

    def flops(self, batch: dict) -> Tensor | float:
        """The pass of the base LM over texts that were not kept is not told apart: as if all were read anew."""
        work, tokens = Work.of_base(self.base), batch["lengths"].double()
        once = 2 * work.body * tokens.sum() + work.attention * tokens.square().sum()
        return once if self.train_base == "frozen" else 4 * once + 6 * work.head * tokens.sum()

    @torch.no_grad()
    def finish(self, folder: Path, datamodule) -> None:
        """Ranks on held-out documents beside the controls, the readout as a folder, and the next command."""
        self.eval()
        documents = datamodule.evaluation_documents(None)[: self.hparams.evaluate["documents"]]
        texts, costs = [], []
        for batch in bar("reading held-out documents")(documents):
            example, cost = self.read_by(batch["ids"][0].to(self.device))
            texts.append(Text(example, batch["domain"][0]))
            costs += [] if cost is None else [float(cost.mean())]
        about = {"nll": sum(costs) / len(costs)} if costs else {}
        told = report(measure(self.readout, texts), "What the next gist is", about, len(texts))
        if costs:
            told.notes.append(f"NLL of a token of these texts by the base LM that learned: {about['nll']:.3f} nats.")
        told.show()
        print(told.write(folder / "report"))
        if self.train_base == "frozen":  # else it is worth nothing without the base LM that learned with it
            about = (dict(self.hparams.readout), self.gistnet, folder / "prediction", str(folder.name))
            save_prediction(self.readout, *about)
        print(f"Next: python -m megactx.studies.prediction {folder} --path TEXTS")
