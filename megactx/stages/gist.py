"""Stage ``gist``: train a GistNet or another compressor against a frozen base LM by packed substitution (method 3, 4).

Trained controls (``blockmean_linear`` by default) learn beside it: the same blocks, the same prefill, the same steps
and learning rate, each with its own gradient clipping. So the table at the end compares like with like.
"""

import logging
from pathlib import Path
from typing import Annotated, Literal, TypedDict

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

from megactx.data.documents import length_of
from megactx.data.segments import RECENCY, SEGMENT
from megactx.data.spans_module import LONGEST_DOCUMENT
from megactx.evaluation.curriculum import of_gists, write_curriculum
from megactx.evaluation.summary import check_targets
from megactx.evaluation.sums import loggable
from megactx.evaluation.validation import ValidationMetrics
from megactx.framework.config.types import ArgumentsOf, Count, NonNegative, Whole
from megactx.framework.run.next_command import ABOUT, NET, experiment_of, next_command
from megactx.gist import GistNet
from megactx.gist.carrier import Compressor
from megactx.gist.loss import Context, build_losses, loss_kind, needed
from megactx.gist.memory_estimate import in_words, memory_estimate
from megactx.lm.prefill_cache import KEPT, PrefillCache
from megactx.memory.pyramid import Attention
from megactx.memory.trunk import trunk

from .chain_page import write_page
from .gist_attention import check_attention
from .gist_nets import build_nets, groups_of, reads_with_base, refuse_without_vectors
from .gist_report import report
from .kept_controls import KeptControls
from .stage import BaseSettings, FrozenBaseStage, portable
from .taking import take_weights
from .work import Work

log = logging.getLogger(__name__)
AFTER = {"gist_stage2": "gist_stage3", "gist_stage3": "lens"}  # the curriculum, and what reads its gists


def following(folder: Path) -> str:
    """The command of the stage behind a run's; behind one that is not of the curriculum its second."""
    experiment = AFTER.get(experiment_of(folder), "gist_stage2")
    if experiment == "lens":
        return next_command(folder, experiment, {"stage.gistnet": folder}, (*ABOUT, "block_size"))
    return next_command(folder, experiment, {"stage.init": folder}, (*ABOUT, "block_size", *NET, "attention"))


class Evaluate(TypedDict, total=False):
    """What the end-of-run report measures; 0 leaves a part out."""

    blocks: Count
    controls: bool
    copies: Whole
    level2: Whole
    reconstruction: Whole
    history: Whole
    path: str | None


class Prefills(TypedDict, total=False):
    """Prefills of training documents that are kept for later steps and runs, see ``PrefillCache``."""

    gigabytes: NonNegative
    dtype: Literal[KEPT]


class GistStage(FrozenBaseStage):
    """GistNet training with a frozen base.

    Args:
        base: ``name`` of a Hugging Face model, folder or ``asset:NAME``.
        gistnet: keyword arguments of ``GistNet`` other than width and scale.
        compressor: what is trained. ``name``: ``gistnet``, or a file of ``megactx/gist/carriers`` with parameters, and
            its own arguments.
        controls: name -> the same of a compressor that is trained beside the main one, a GistNet where there is no
            ``name``, and ``lr`` where it has its own; ``None`` leaves it out.
        horizon: H, tokens.
        losses: name of a file of ``megactx/gist/losses`` -> its arguments; the loss is their sum by ``weight``.
        lr, min_lr, weight_decay, warmup, max_steps: AdamW with linear warm-up and a cosine over ``max_steps``.
        muon_lr: learning rate of Muon for the matrices of GistNets, the controls too; ``None`` leaves all to AdamW.
            Without a backbone it is AdamW always, which measured better there.
        targets: metric name -> number, printed beside the result.
        evaluate: what the end-of-run report measures. ``blocks``: about how many; ``controls``: the untrained controls
            too, or not; ``copies``: blocks per distance for copy recovery; ``level2``: spans of K^2 tokens that gists
            of gists replace; ``reconstruction``: steps of a decoder trained to tell what gists keep (0: none of it);
            ``path``: files to report on besides the held-out documents (``None``: only those).
        prefills: ``gigabytes`` of the cache that hold prefills of training documents at most, 0 for none, and their
            ``dtype``; ``None``: none.
        keep_controls: controls that an earlier run has trained on the same blocks are taken from the cache and do not
            learn again, and those of this run go there; see ``kept_controls``.
        init: checkpoint, run folder or saved GistNet that ``start_from`` reads before a fresh run; ``None`` starts from
            nothing.
        attention: keyword arguments of ``Attention``, by which documents and branches are read, in training and in the
            report; ``None``: plain.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    monitor = "val/dnll"
    timed = reports_best = True
    takes = {"base": "base.name", "gistnet": "stage.init"}
    gives = {"gistnet": ""}

    def __init__(
        self,
        base: BaseSettings,
        gistnet: Annotated[dict, ArgumentsOf(GistNet)],
        controls: dict,
        horizon: Count,
        losses: Annotated[dict, ArgumentsOf(loss_kind, each=True)],
        lr: NonNegative,
        muon_lr: NonNegative | None,
        min_lr: NonNegative,
        weight_decay: NonNegative,
        warmup: Whole,
        max_steps: Count,
        targets: dict[str, float],
        evaluate: Evaluate,
        init: str | None = None,
        compressor: dict | None = None,
        prefills: Prefills | None = None,
        keep_controls: bool = False,
        attention: Annotated[dict, ArgumentsOf(Attention)] | None = None,
    ):
        super().__init__()
        base = base | {"name": portable(base["name"])}
        self.save_hyperparameters()
        self.check_settings()
        check_targets(targets, horizon)
        self.take_base(base)
        self.nets = build_nets(self.base, compressor or {}, gistnet, controls, keep_controls)
        self.losses = build_losses(losses, dict(self.nets))
        self.weighted = [loss for loss in self.losses if loss.weight]
        if any(loss.judges for loss in self.weighted):
            self.monitor = "val/loss"  # a net that is better at it may be worse behind single blocks
        self.kept: PrefillCache | None = None
        self.controls: KeptControls | None = None
        self.taken: dict[str, list] = {}  # controls that an earlier run has trained -> what would learn of them
        if keep_controls and init is not None:
            raise ValueError(
                "stage.keep_controls=true is not allowed with stage.init, for controls then start from another run"
            )
        if not self.main.makes_one_vector:
            refuse_without_vectors(self.hparams)
        self.attention = Attention(**attention or {}).check(self.main.block_size)
        check_attention(self)

    @property
    def main(self) -> Compressor:
        """What the stage is about: the first net."""
        return next(iter(self.nets.values()))

    @property
    def gistnet(self) -> GistNet:
        return self.nets["gistnet"]

    @property
    def learning(self) -> dict[str, Compressor]:
        """The nets that are trained here."""
        return {name: net for name, net in self.nets.items() if name not in self.taken}

    @property
    def with_states(self) -> bool:
        return any(net.needs_hidden for net in self.learning.values())

    def session_parts(self):
        return {"gistnet": self.main}

    def start_from(self, path: str) -> str:
        """Take the weights of another run's compressor and of the controls that both have; -> what was taken.

        Args:
            path: a checkpoint, or a run folder, of which the best one counts; or a saved GistNet, such as an asset.

        Raises:
            ValueError: there is none, or its compressor has another architecture.
        """
        return take_weights(self.nets, path, self.hparams.gistnet, self.base_record, self.base)

    def prepare(self, datamodule) -> None:
        self.fit_data(datamodule, self.main.block_size)
        datamodule.begin_at(self.attention.live_from)
        weight, spans = self.loss_settings("level2").get("weight", 0), datamodule.level2_spans
        levels = self.main.levels
        if bool(weight) != bool(spans) or levels > 1 and not weight:
            raise ValueError(
                f"loss.level2.weight={weight}, datamodule.level2_spans={spans}, gistnet.levels={levels}: gists of"
                " gists are trained with the first two above 0, gists of tokens only with 0, 0 and 1; see"
                " experiment=gist_lod2"
            )

    def check_data(self, datamodule) -> None:
        for loss in self.losses:
            loss.check_data(datamodule, dict(self.nets))

    def loss_settings(self, name: str) -> dict:
        """Those of a loss, with its defaults; empty where it is not in the list."""
        return next((vars(loss) for loss in self.losses if loss.name == name), {})

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if isinstance(self.trainer.strategy, FSDPStrategy) and any(map(reads_with_base, self.nets.values())):
            raise ValueError(
                "gistnet.type=base is not allowed with trainer=fsdp, which cuts up the layers of the base LM that its"
                " encoder reads with; take trainer=ddp"
            )
        if isinstance(self.trainer.strategy, FSDPStrategy) and self.attention.kind != "plain":
            raise ValueError(
                f"attention.kind={self.attention.kind} is not allowed with trainer=fsdp: processes would wait for each"
                " other, for each document is read in passes of its own; take trainer=ddp"
            )
        if self.hparams.keep_controls:
            self.controls = KeptControls(self, self.trainer.datamodule, self.trainer)
            self._take(self.controls.take())
        self.work = self._work()  # now: a strategy may shard the base later
        settings = self.hparams.prefills or {}
        if settings.get("gigabytes"):
            self.kept = PrefillCache(self.base, **settings, layers=self.kept_layers)

    def _take(self, names: list[str]) -> None:
        for parameters in self.taken.values():
            for parameter in parameters:
                parameter.requires_grad_(True)
        self.taken = {name: [p for p in self.nets[name].parameters() if p.requires_grad] for name in names}
        for name in names:
            self.nets[name].requires_grad_(False)

    @property
    def kept_layers(self) -> list[int]:
        return [net.input_layer for net in self.learning.values() if net.needs_hidden]

    def _work(self) -> Work:
        return Work.of_gists(self.base, self.learning, self.losses, self.hparams.horizon, self.attention)

    def flops(self, batch: dict) -> Tensor | float:
        return self.work(batch)

    def amounts(self, batch: dict) -> dict:
        spans = sum(batch[name].numel() for name in ("block_starts", "span_starts", "segments") if name in batch)
        tokens = batch["lengths"].sum()
        if "segments" in batch:  # read once more, behind what is compressed of the rest
            tokens = tokens + batch["segments"].numel() * sum(self.windows)
        return {"tokens": tokens, "documents": len(batch["ids"]), "spans": spans}

    @property
    def windows(self) -> tuple[int, int]:
        """S and R, tokens of a segment of history mode and raw ones before it; those of the report where it is off."""
        settings = self.loss_settings("history")
        return settings.get("segment", SEGMENT), settings.get("recency", RECENCY)

    def flops_ahead(self, data: dict, preset: dict) -> float:
        longest = data["max_tokens"] or min(LONGEST_DOCUMENT, self.base.max_positions)
        tokens, batch = (data["min_tokens"] + longest) // 2, data["batch"]
        starts = torch.full((batch, data["spans"]), tokens // 2)
        mean = {"lengths": torch.full((batch,), tokens), "block_starts": starts}
        if data["level2_spans"]:
            mean["span_starts"] = starts[:, : data["level2_spans"]]
        if needed(self.losses) & {"segments"}:
            mean["segments"] = mean["copied_blocks"] = torch.full((batch, data["history"]["segments"]), tokens // 2)
        for loss in self.weighted:
            mean |= loss.typical(data, self.main.block_size)
        return float(self._work()(mean)) * preset["accumulate"] * self.hparams.max_steps

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data = self.trainer.datamodule
        for name in self.taken:
            log.info("stage.controls.%s is not trained: an earlier run has, %s", name, self.controls.file(name))
        flops = ", ".join(f"{name} {net.flops_per_block(self.base) / 1e6:.1f}" for name, net in self.nets.items())
        log.info("MFLOP per block of %d tokens: %s", self.main.block_size, flops)
        shape = (data.batch, data.max_tokens, data.spans + data.level2_spans, self.hparams.horizon)
        need = in_words(memory_estimate(self.base, self.learning.values(), *shape, self.device.type, data.history))
        if self.kept is not None:
            documents = data.training.pools.values()
            tokens = sum(length_of(document) for pool in documents for document in pool)
            log.info(
                "Prefills of %d documents take %.1f GB of %s; there is room for %.1f GB more",
                *(sum(map(len, documents)), tokens * self.kept.bytes_per_token() / 1e9),
                *(self.kept.folder, max(0, self.kept.room) / 1e9),
            )
        log.info("Memory of a step with %d documents of %d tokens: %s", data.batch, data.max_tokens, need)

    def context(self, batch: dict) -> Context:
        """A batch that the base LM has read."""
        if self.kept is None:
            read = trunk(self.base, self.main, batch["ids"], batch["lengths"], self.attention, self.with_states)
        else:
            read = self.kept(batch["ids"], batch["lengths"])
        return Context(self.base, self.learning, read, batch, self.hparams.horizon)

    def training_step(self, batch: dict, batch_index: int) -> Tensor:
        context, total = self.context(batch), 0.0
        for loss in self.losses:
            if loss.weight:
                values, numbers = loss(context)
                total = total + loss.weight * values.sum()
                for name, value in numbers.items():
                    # A plain number is of the first process alone.
                    how = {"sync_dist": True} if isinstance(value, Tensor) else {"rank_zero_only": True}
                    self.log(f"train/{name}", value, prog_bar=name == "dnll", **how)
        return total

    def on_validation_epoch_start(self) -> None:
        level2 = self.loss_settings("level2").get("weight", 0) > 0
        settings = {"level2": level2, "attention": self.attention}
        self.metrics = ValidationMetrics(self.hparams.horizon, self.base.width, **settings).to(self.device)

    def validation_step(self, batch: dict, batch_index: int) -> None:
        self.metrics.update(self.base, self.main, batch)
        if batch_index == 0:  # in the step, where precision is that of a step
            self.held = {loss: loss.held_out(self.base, self.main, self.trainer.datamodule) for loss in self.weighted}

    def on_validation_epoch_end(self) -> None:
        values = loggable(self.metrics.compute())
        shown = {"dnll", "recovery"}
        for loss, numbers in self.held.items():
            values |= {f"{loss.name}/{name}": value for name, value in numbers.items()}
        if self.monitor == "val/loss":
            values["loss"] = self.loss_settings("block").get("weight", 0) * values["dnll"]
            values["loss"] += sum(loss.weight * self.held[loss]["nll"] for loss in self.weighted if loss.judges)
            shown |= {"loss"}
        for name, value in values.items():
            self.log(f"val/{name}", value, prog_bar=name in shown)

    @property
    def parts(self) -> dict:
        return {name: list(net.parameters()) for name, net in self.learning.items()}

    def groups(self) -> list[dict]:
        h = self.hparams
        return groups_of(self.learning, h.lr, h.muon_lr, h.weight_decay, h.controls)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.controls is not None:
            checkpoint["taken"], checkpoint["controls"] = list(self.taken), self.controls.state()
        checkpoint["losses"] = {loss.name: state for loss in self.losses if (state := loss.state())}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.controls is not None:
            self.controls.going_on(checkpoint["controls"])
        if self.hparams.keep_controls:  # who goes on has what it began with, whatever is kept by now
            self._take(checkpoint.get("taken", []))
            self.work = self._work()
        for loss in self.losses:
            if loss.name in checkpoint.get("losses", {}):
                loss.load_state(checkpoint["losses"][loss.name])

    def on_train_end(self) -> None:
        """Controls that have had all their steps are kept."""
        if (
            self.controls is not None
            and self.trainer.is_global_zero
            and self.trainer.global_step == self.hparams.max_steps
        ):
            self.controls.keep([name for name in self.learning if name in self.hparams.controls])

    @torch.inference_mode()
    def finish(self, folder: Path, datamodule) -> None:
        """Report on held-out documents and on ``evaluate.path``: tables, pictures, scores; then the next command."""
        report(self, folder, datamodule)
        for loss in self.weighted:
            if said := loss.told(self.base, self.main, datamodule):
                print(said)
        print(f"Next: {following(folder)}  (go on from here)")
        print(f"or:   {next_command(folder, 'curriculum', {})}  (all stages)")
        if not any(loss.all_vectors for loss in self.weighted):  # rivals by keys and values cannot learn from it
            print(f"or:   {next_command(folder, None, {}, program='python -m megactx.studies.ladder')}  (rivals)")

    @staticmethod
    def conclude(folder: Path, stages: list[str]) -> None:
        """The end of a curriculum: of gist stages alone one table and one picture, else a page about all of them."""
        if all(of_gists(folder / name) for name in stages):
            write_curriculum(folder, stages)
        else:
            write_page(folder, stages)
