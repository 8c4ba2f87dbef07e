"""Stage ``attention``: adapters of a frozen base LM learn to read under MegaAttention, with full attention as teacher.

A base LM was never shown rows that see gists in place of far text, so LoRA is trained on the KL from its own full
attention, without adapters, over every token of a window. Windows are raw, or have gists in some places.
"""

import logging
from pathlib import Path
from typing import Annotated, TypedDict

import torch
from torch import Tensor

from megactx.evaluation.attention import FULL, Costs
from megactx.framework.bar import bar
from megactx.framework.config.types import ArgumentsOf, Count, NonNegative, Share, Whole
from megactx.lm.adapters import adapt, adapters_of, switched_off
from megactx.lm.chunked_head import score
from megactx.memory import MegaContextTree, WorkingContext
from megactx.memory.pyramid import PLAIN, Attention

from .joint import Lora
from .stage import BaseSettings, GistReaderStage, portable, portable_part
from .work import Work

log = logging.getLogger(__name__)


class Evaluate(TypedDict):
    """Of the end-of-run report."""

    documents: Count


class AttentionStage(GistReaderStage):
    """LoRA that learns to read under another attention.

    Args:
        base: ``name`` and ``dtype`` of the base LM.
        gistnet: whose gists are the summaries: ``asset:NAME``, a folder, a run or a checkpoint.
        attention: keyword arguments of ``Attention``.
        lora: ``rank``, ``layers`` and ``embeddings``, see ``adapt``.
        coarse: share of the windows in which some blocks are gists; the others are raw.
        lr, min_lr, weight_decay, warmup, max_steps: of AdamW and its cosine.
        evaluate: ``documents``: held-out ones in the end-of-run report.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    monitor = "val/dnll"
    takes = {"base": "base.name", "gistnet": "stage.gistnet"}
    reports_best = True
    shorter = "preset.steps=N and preset.max_tokens=N make it short"

    def __init__(
        self,
        base: BaseSettings,
        gistnet: str,
        attention: Annotated[dict, ArgumentsOf(Attention)],
        lora: Lora,
        coarse: Share,
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
        self.attention = Attention(**attention).check(self.gistnet.block_size)
        adapt(self.base, **lora)
        for parameter in adapters_of(self.base).values():
            parameter.requires_grad_(True)

    def set_dtype(self, dtype: torch.dtype) -> None:
        super().set_dtype(dtype)
        for parameter in adapters_of(self.base).values():  # what learns stays in fp32
            parameter.data = parameter.data.float()

    def prepare(self, datamodule) -> None:
        super().prepare(datamodule)
        try:
            self.attention.pyramid(self.window(torch.zeros(1, 2 * self.gistnet.block_size, dtype=torch.long)))
        except ValueError as error:
            raise ValueError(f"{error}; the group attention has it") from error

    def groups(self) -> list[dict]:
        h = self.hparams
        return [{"params": list(adapters_of(self.base).values()), "lr": h.lr, "weight_decay": h.weight_decay}]

    def kept_of_base(self) -> set[str]:
        return set(adapters_of(self.base))

    def window(self, ids: Tensor, shown: Tensor | None = None) -> WorkingContext:
        """A document ids [1, T] -> its window, raw but for the blocks of ``shown``, bool [T // K], which are gists."""
        with torch.no_grad(), switched_off(self.base) as base:
            tree = MegaContextTree.from_tokens(ids, self.gistnet, base)
        k, tokens = tree.block_size, ids.shape[1]
        lod = torch.zeros(tokens, dtype=torch.long, device=ids.device)
        index = torch.arange(tokens, device=ids.device)
        if shown is not None:
            gist = shown.to(ids.device).repeat_interleave(k)
            gist = torch.cat([gist, gist.new_zeros(tokens - len(gist))])
            keep = ~gist | (index % k == 0)
            lod, index = gist.long()[keep], torch.where(gist, index // k, index)[keep]
        return WorkingContext(tree, lod[None], index[None], [len(index)], tokens)

    def coarsened(self, tokens: int) -> Tensor | None:
        """Blocks that a window shows as gists, bool [T // K]; the sink and the live region stay raw."""
        if torch.rand(()) >= self.hparams.coarse:
            return None
        k = self.gistnet.block_size
        chosen = torch.rand(tokens // k) < torch.rand(())
        chosen[0] = False
        chosen[max(0, tokens - self.attention.live - self.attention.segment) // k :] = False
        return chosen

    def compared(self, ids: Tensor, shown: Tensor | None) -> tuple[Tensor, dict]:
        """A document ids [1, T] -> KL from full attention per scored token, and the numbers of ``score``."""
        context = self.window(ids, shown)
        with torch.no_grad(), switched_off(self.base) as base:
            teacher = base(base.embed(ids), None)[0]
        raw = (context.lods()[0] == 0).nonzero()[:, 0]
        at = context.starts()[0, raw]
        raw, at = raw[at < ids.shape[1] - 1], at[at < ids.shape[1] - 1]
        hidden = self.attention.read(self.base, context)[:, raw]
        loss, numbers = score(self.base, hidden, teacher[at], ids[0, at + 1])
        return loss[0], numbers

    def training_step(self, batch: dict) -> Tensor:
        losses, lost = [], []
        for ids, length in zip(batch["ids"], batch["lengths"].tolist(), strict=True):
            loss, numbers = self.compared(ids[None, :length], self.coarsened(length))
            losses.append(loss.mean())
            lost.append((numbers["nll"][0] - numbers["full"]).mean())
        loss = torch.stack(losses).mean()
        self.log("train/kl", loss.detach())
        self.log("train/dnll", torch.stack(lost).mean(), prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # KL, dNLL, documents

    def validation_step(self, batch: dict, batch_index: int) -> None:
        for ids, length in zip(batch["ids"], batch["lengths"].tolist(), strict=True):
            loss, numbers = self.compared(ids[None, :length], None)
            lost = (numbers["nll"][0] - numbers["full"]).mean()
            self.sums += torch.stack([loss.mean(), lost, lost.new_ones(())]).double()

    def on_validation_epoch_end(self) -> None:
        kl, lost, count = self.trainer.strategy.reduce(self.sums, reduce_op="sum")
        self.log("val/dnll", lost / count, prog_bar=True)
        self.log("val/kl", kl / count)

    def flops(self, batch: dict) -> Tensor | float:
        """The teacher forward; the reader forward, and backward for activations alone. Gists are left out."""
        work, tokens = Work.of_base(self.base), batch["lengths"].double()
        pairs = 2 * work.attention * tokens.square().sum()
        return 3 * 2 * (work.body + work.head) * tokens.sum() + 3 * pairs

    @torch.no_grad()
    def finish(self, folder: Path, datamodule) -> None:
        """What reading so costs on held-out documents, before and after, and the next command."""
        self.eval()
        kind = self.attention.kind
        arms = {
            FULL: (PLAIN, lambda context: self.untrained(PLAIN, context)),
            f"{kind}, trained": (self.attention, lambda context: self.attention.read(self.base, context)),
            f"{kind}, untrained": (self.attention, lambda context: self.untrained(self.attention, context)),
        }
        costs = Costs(self.base, arms, self.attention)
        documents = datamodule.evaluation_documents(None)[: self.hparams.evaluate["documents"]]
        shown = bar("reading held-out documents")(documents)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            for _ in costs.measure(self.window(batch["ids"].to(self.device)).tree for batch in shown):
                pass
        report = costs.report(f"Reading under attention={kind}", {"attention": dict(self.hparams.attention)})
        report.show()
        print(report.write(folder / "report"))
        print(f"Next: python -m megactx.studies.mega_attention --trained {folder}")

    def untrained(self, attention: Attention, context: WorkingContext) -> Tensor:
        """What the base LM makes of a window without its adapters."""
        with switched_off(self.base) as base:
            return attention.read(base, context)
