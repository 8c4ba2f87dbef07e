"""Stage ``gist``: train a GistNet or another compressor against a frozen base LM by packed substitution (method 3, 4).

Trained controls (``blockmean_linear`` by default) learn beside it: the same blocks, the same teacher pass, the same
steps and learning rate, each with its own gradient clipping. So the table at the end compares like with like.
"""

import logging
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn

from megactx.assets import resolve
from megactx.data.documents import length_of
from megactx.data.spans_module import LONGEST_DOCUMENT
from megactx.evaluation.curriculum import write_curriculum
from megactx.evaluation.summary import check_targets
from megactx.evaluation.sums import loggable
from megactx.evaluation.validation import ValidationMetrics
from megactx.framework.next_command import next_command
from megactx.framework.optimizers import warmup_cosine
from megactx.framework.throughput import Work
from megactx.gist import GistNet
from megactx.gist.carrier import Compressor, Slots, Vectors
from megactx.gist.footprint import footprint, in_words
from megactx.gist.history import check_segments, old_blocks, with_carriers, with_everything
from megactx.gist.losses import contrastive
from megactx.gist.packed_loss import substitution_loss
from megactx.gist.recall import full, mixed
from megactx.lm import BaseLM
from megactx.lm.chunked_head import OBJECTIVES, score
from megactx.lm.prefill import Prefill, blocks, prefill

from .gist_nets import build_nets, optimizer_of, refuse_without_vectors, take_weights
from .gist_report import report
from .trained import leave_out_base, put_base_back, record_of, refuse_other_base, tell_of_sessions

log = logging.getLogger(__name__)


def history_is_on(history: dict | None) -> bool:
    """Whether segments behind compressed histories are read."""
    return bool(history) and bool(history["weight"] or history.get("recall"))


class GistStage(lightning.LightningModule):
    """GistNet training with a frozen base.

    Args:
        base: ``name`` of a Hugging Face model, folder or ``asset:NAME``.
        gistnet: keyword arguments of ``GistNet`` other than width and scale.
        compressor: what is trained. ``name``: ``gistnet``, or a file of ``megactx/gist/carriers`` with parameters, and
            its own arguments.
        controls: name -> the same of a compressor that is trained beside the main one, a GistNet where there is no
            ``name``, and ``lr`` where it has its own; ``None`` leaves it out.
        horizon: H, tokens.
        objective: ``kl`` or ``delta_nll``.
        seam_weight: of the first 4 offsets of the horizon in the loss, from 0 to 1; the others have as much more.
        contrastive: ``weight`` (lambda) and ``margin``.
        lr, min_lr, weight_decay, warmup, max_steps: AdamW with linear warm-up and a cosine over ``max_steps``.
        muon_lr: learning rate of Muon for the matrices of GistNets, the controls too; ``None`` leaves all to AdamW.
            Without a backbone it is AdamW always, which measured better there.
        targets: metric name -> number, printed beside the result.
        evaluate: what the end-of-run report measures. ``blocks``: about how many; ``controls``: the untrained controls
            too, or not; ``copies``: blocks per distance for copy recovery; ``level2``: spans of K^2 tokens that gists
            of gists replace; ``reconstruction``: steps of a decoder trained to tell what gists keep (0: none of it);
            ``path``: files to report on besides the held-out documents (``None``: only those).
        history: ``weight`` of history mode in the loss; span mode has the rest. ``recall``: weight of the NLL of an old
            block that comes back, itself in tokens and all others compressed (``gist.recall``), for compressors that
            make vectors. The rest of it: see ``SpanData``.
        level2_weight: of the loss of gists of gists, which replace ``level2_spans`` spans of K^2 tokens per document; 0
            trains gists of tokens only.
        init: checkpoint or run folder that ``start_from`` reads before a fresh run; ``None`` starts from nothing.
    """

    monitor = "val/dnll"  # of which a new minimum is worth a checkpoint
    timed = True  # preset.minutes may decide how many steps there are: they are all alike
    reports_best = True  # that checkpoint is what the report is of, and what the next stage starts from

    def __init__(
        self,
        base: dict,
        gistnet: dict,
        controls: dict,
        horizon: int,
        objective: str,
        contrastive: dict,
        lr: float,
        muon_lr: float | None,
        min_lr: float,
        weight_decay: float,
        warmup: int,
        max_steps: int,
        targets: dict,
        evaluate: dict,
        init: str | None = None,
        level2_weight: float = 0.0,
        compressor: dict | None = None,
        history: dict | None = None,
        seam_weight: float = 1.0,
    ):
        super().__init__()
        if not str(base["name"]).startswith("asset:"):
            base = base | {"name": resolve(base["name"])}  # absolute, so that a checkpoint loads from any folder
        self.save_hyperparameters()
        if objective not in OBJECTIVES:
            raise ValueError(f"stage.objective={objective} is not known, allowed are {', '.join(OBJECTIVES)}")
        if not 0 <= seam_weight <= 1:
            raise ValueError(f"stage.seam_weight={seam_weight} is not allowed: from 0 to 1")
        check_targets(targets, horizon)
        self.without_pairs = 0  # batches in which the contrastive term had no pair
        self.base = BaseLM.from_pretrained(**base).freeze()
        self.base_record = record_of(self.base, base["name"])
        self.nets = build_nets(self.base, compressor or {}, gistnet, controls)
        self.with_states = any(net.needs_hidden for net in self.nets.values())
        if not self.main.makes_vectors:
            refuse_without_vectors(self.hparams)
        if history and not 0 <= history["weight"] <= 1:
            raise ValueError(f"history.weight={history['weight']} is not allowed: from 0 to 1")
        if recall := (history or {}).get("recall", 0.0):
            if recall < 0:
                raise ValueError(f"history.recall={recall} is not allowed: 0 or more")
            if slots := [name for name, net in self.nets.items() if not net.makes_vectors]:
                raise ValueError(
                    f"history.recall={recall} is not allowed with {slots[0]}, which makes keys and values, not vectors:"
                    " set it to 0"
                )

    @property
    def main(self) -> Compressor:
        """What the stage is about: the first net."""
        return next(iter(self.nets.values()))

    @property
    def gistnet(self) -> GistNet:
        return self.nets["gistnet"]

    def start_from(self, path: str) -> str:
        """Take the weights of another run's compressor and of the controls that both have; -> what was taken.

        Args:
            path: a checkpoint, or a run folder, of which the best one counts.

        Raises:
            ValueError: there is none, or its compressor has another architecture.
        """
        return take_weights(self.nets, Path(path).expanduser(), self.hparams.gistnet, self.base_record)

    def setup(self, stage: str) -> None:
        # A frozen base needs no fp32 master weights: under bf16 its casts would be repeated at every call.
        mixed = str(self.trainer.precision).startswith("bf16")
        self.base.to(torch.bfloat16 if mixed else torch.float32)

    def flops_ahead(self, data: dict, preset: dict) -> float:
        """About how many floating-point operations the training takes; ``data`` and ``preset`` are of the config."""
        longest = data["max_tokens"] or min(LONGEST_DOCUMENT, self.base.max_positions)
        tokens, batch = (data["min_tokens"] + longest) // 2, data["batch"]
        starts = torch.full((batch, data["spans"]), tokens // 2)
        mean = {"lengths": torch.full((batch,), tokens), "starts": starts}
        if data["level2_spans"]:
            mean["starts2"] = starts[:, : data["level2_spans"]]
        if history_is_on(data["history"]):
            mean["segments"] = torch.full((batch, data["history"]["segments"]), tokens // 2)
        return float(Work.of(self)(mean)) * preset["accumulate"] * self.hparams.max_steps

    def on_fit_start(self) -> None:
        self.check_data(self.trainer.datamodule)
        flops = ", ".join(f"{name} {net.flops_per_block(self.base) / 1e6:.1f}" for name, net in self.nets.items())
        log.info("MFLOP per block of %d tokens: %s", self.main.block_size, flops)
        data = self.trainer.datamodule
        shape = (data.batch, data.max_tokens, data.spans + data.level2_spans, self.hparams.horizon)
        history = self.hparams.history if history_is_on(self.hparams.history) else None
        need = in_words(footprint(self.base, self.nets.values(), *shape, self.device.type, history))
        log.info("Memory of a step with %d documents of %d tokens: %s", data.batch, data.max_tokens, need)

    def substitution_loss(self, batch: dict, level: int = 1, teacher: Prefill | None = None):
        """-> (loss per net [C], dNLL per net [C], carriers) over sampled blocks of a batch, or spans of K^2 tokens.

        Args:
            level: 1, blocks and their carriers; 2, spans and the gists of their gists.
            teacher: of these documents, where there is one already.
        """
        teacher = teacher or prefill(self.base, batch["ids"], self.with_states)
        starts, asked = batch["starts" if level == 1 else "starts2"], self.hparams
        nets, sizes = list(self.nets.values()), (batch["lengths"], asked.horizon, asked.objective)
        return substitution_loss(self.base, nets, teacher, starts, *sizes, level, asked.seam_weight)

    def old_carriers(self, batch: dict, teacher: Prefill) -> list[Vectors | Slots]:
        """Of each net: carriers of all blocks that a segment sees compressed. History and recall read the same ones."""
        starts, asked = batch["segments"], self.hparams.history
        check_segments(starts, batch["lengths"], self.main.block_size, asked["segment"], asked["recency"])
        old = old_blocks(starts, self.main.block_size, asked["recency"])
        return [net.compress(self.base, teacher, old) for net in self.nets.values()]

    def history_loss(self, batch: dict, teacher: Prefill, carriers: list[Vectors | Slots] | None = None):
        """-> (loss per net [C], dNLL per net [C]) over segments behind compressed histories.

        Args:
            carriers: those of ``old_carriers``, where they are there already.
        """
        starts, asked = batch["segments"], self.hparams.history
        sizes = (self.main.block_size, asked["segment"], asked["recency"])
        carriers = carriers or self.old_carriers(batch, teacher)
        hidden = torch.stack([with_carriers(self.base, teacher, starts, own, *sizes) for own in carriers])
        loss, numbers = score(
            self.base,
            hidden.flatten(1, 3),
            with_everything(teacher, starts, asked["segment"]).flatten(0, 2),
            blocks(batch["ids"], starts, asked["segment"]).flatten(),
            self.hparams.objective,
        )
        return loss.mean(dim=1), (numbers["nll"] - numbers["full"]).mean(dim=1)

    def recall_loss(self, batch: dict, teacher: Prefill, carriers: list[Vectors | Slots] | None = None):
        """-> dNLL per net [C] of old blocks that come back, each in tokens among gists; with gradient.

        Not the KL from the full context, which has more text that could go on, and so copies less surely.
        """
        starts, told, asked = batch["segments"], batch["told"], self.hparams.history
        block, recency = self.main.block_size, asked["recency"]
        carriers, old = carriers or self.old_carriers(batch, teacher), old_blocks(starts, block, recency)
        hidden = torch.stack([mixed(self.base, teacher, starts, told, old, own, block, recency) for own in carriers])
        again = blocks(batch["ids"], told, block).flatten()
        known = full(self.base, teacher, starts, told, block).flatten(0, 2)
        return score(self.base, hidden.flatten(1, 3), known, again, "delta_nll")[0].mean(dim=1)

    def training_step(self, batch: dict, batch_index: int) -> Tensor:
        teacher = prefill(self.base, batch["ids"], self.with_states)
        weight = self.hparams.history["weight"] if self.hparams.history else 0.0
        total = 0.0
        if weight < 1:
            losses, dnll, carriers = self.substitution_loss(batch, teacher=teacher)
            self._log_training(losses, dnll)
            total = (1 - weight) * losses.sum()
        if share := self.hparams.contrastive["weight"]:  # whatever share history has
            gists = (carriers[0] if weight < 1 else self.main.compress(self.base, teacher, batch["starts"])).vectors
            term = self._contrastive(batch, teacher, gists)
            self.log("train/contrastive", term.detach(), sync_dist=True)
            # Of the first process, since the run began: steps in which no block had a right neighbour.
            self.log("train/contrastive_without_pairs", float(self.without_pairs), rank_zero_only=True)
            total = total + share * term
        recall = (self.hparams.history or {}).get("recall", 0.0)
        old = self.old_carriers(batch, teacher) if weight or recall else None
        if weight:
            losses, dnll = self.history_loss(batch, teacher, old)
            self._log_training(losses, dnll, "history/")
            total = total + weight * losses.sum()
        if recall:
            losses = self.recall_loss(batch, teacher, old)
            self._log_training(losses, losses.detach(), "recall/")
            total = total + recall * losses.sum()
        if share := self.hparams.level2_weight:
            losses, dnll, _ = self.substitution_loss(batch, 2, teacher)
            self._log_training(losses, dnll, "level2/")
            total = total + share * losses.sum()
        return total

    def _log_training(self, losses: Tensor, dnll: Tensor, what: str = "") -> None:
        self.log(f"train/{what}loss", losses[0].detach(), sync_dist=True)
        self.log(f"train/{what}dnll", dnll[0].detach(), prog_bar=not what, sync_dist=True)
        for index, name in enumerate(self.nets):
            if index:
                self.log(f"train/{what}{name}/dnll", dnll[index].detach(), sync_dist=True)

    def check_data(self, datamodule) -> None:
        """See that the contrastive term can have a pair.

        Raises:
            ValueError: no training document has room for a block with a right neighbour.
        """
        needed, weight = 3 * self.main.block_size, self.hparams.contrastive["weight"]
        pools = datamodule.training.pools.values()
        if weight and not any(length_of(document) >= needed for pool in pools for document in pool):
            raise ValueError(
                f"contrastive.weight={weight} is not allowed here: no training document has {needed} tokens, the sink"
                " block, a block and its right neighbour; set it to 0, or data.min_tokens higher, or give longer texts"
            )

    def _contrastive(self, batch: dict, teacher: Prefill, gists: Tensor) -> Tensor:
        block = self.main.block_size
        right = batch["starts"] + block
        paired = right + block <= batch["lengths"][:, None]
        if not paired.any():  # a batch of documents that are too short for it is no reason to stop
            self.without_pairs += 1
            return gists.new_zeros(())
        # A block without a right neighbour gathers within the document, and is then left out.
        safe = torch.where(paired, right, batch["starts"])
        neighbours = self.main.compress(self.base, teacher, safe).vectors
        return contrastive(gists[paired], neighbours[paired], self.hparams.contrastive["margin"])

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        for net in self.nets.values():  # a control's spike must not shrink the GistNet's step
            nn.utils.clip_grad_norm_(net.parameters(), gradient_clip_val or float("inf"))

    def on_validation_epoch_start(self) -> None:
        level2 = self.hparams.level2_weight > 0
        self.metrics = ValidationMetrics(self.hparams.horizon, self.base.width, level2=level2).to(self.device)

    def validation_step(self, batch: dict, batch_index: int) -> None:
        self.metrics.update(self.base, self.main, batch)

    def on_validation_epoch_end(self) -> None:
        values = loggable(self.metrics.compute())
        shown = {"dnll", "recovery"}
        for name, value in values.items():
            self.log(f"val/{name}", value, prog_bar=name in shown)

    def configure_optimizers(self):
        h = self.hparams
        optimizer = optimizer_of(self.nets, h.lr, h.muon_lr, h.weight_decay, h.controls)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, h.warmup, h.max_steps, h.min_lr / h.lr)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["without_pairs"] = self.without_pairs
        leave_out_base(checkpoint)
        checkpoint["base"] = self.base_record

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.without_pairs = checkpoint.get("without_pairs", 0)
        refuse_other_base(checkpoint, self.base_record)
        put_base_back(checkpoint, self.base)

    def prepare(self, datamodule) -> None:
        """Tell the data how long a document the base takes, and see that it has what this stage is trained on.

        Raises:
            ValueError: its blocks have another size; gists of gists have a loss and no spans, or spans or weights of
                their own and no loss.
        """
        datamodule.limit_to(self.base.max_positions)
        tell_of_sessions(self.base, self.main.block_size)
        if self.main.block_size != datamodule.block:
            raise ValueError(
                f"block_size: the compressor has {self.main.block_size}, the data has {datamodule.block}; set"
                " block_size=, which is for both"
            )
        weight, spans, levels = (
            self.hparams.level2_weight,
            datamodule.level2_spans,
            1 + len(getattr(self.main, "above", ())),
        )
        if bool(weight) != bool(spans) or levels > 1 and not weight:
            raise ValueError(
                f"stage.level2_weight={weight}, datamodule.level2_spans={spans}, gistnet.levels={levels}: gists of"
                " gists are trained with the first two above 0, gists of tokens only with 0, 0 and 1; see"
                " experiment=gist_lod2"
            )

    @torch.inference_mode()
    def finish(self, folder: Path, datamodule) -> None:
        """Report on held-out documents and on ``evaluate.path``: tables, pictures, scores; then the next command."""
        report(self, folder, datamodule)
        print(f"Next: {next_command(folder, 'gist_stage2', {'stage.init': folder})}  (go on from here)")
        print(f"or:   {next_command(folder, 'curriculum', {})}  (all stages)")
        print(f"or:   {next_command(folder, None, {}, program='python -m megactx.studies.ladder')}  (rivals)")

    @staticmethod
    def conclude(folder: Path, stages: list[str]) -> None:
        """The end of a curriculum: all its stages in one table and one picture."""
        write_curriculum(folder, stages)
