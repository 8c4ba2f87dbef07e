"""Stage ``gist``: train a GistNet against a frozen base LM by packed substitution (SPEC 3, 4).

Trained controls (``blockmean_linear`` by default) learn beside it: the same blocks, the same teacher pass, the same
steps and learning rate, each with its own gradient clipping. So the table at the end compares like with like.
"""

import logging
import sys
from functools import partial
from pathlib import Path

import lightning
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import default_convert

from megactx.assets import resolve
from megactx.data.files import Files
from megactx.evaluation.curriculum import write_curriculum
from megactx.evaluation.measure import measure
from megactx.evaluation.passages import measure_copies, measure_level
from megactx.evaluation.plots import plot_run
from megactx.evaluation.reconstruction import reconstruction, train_decoder
from megactx.evaluation.report import print_report, write_report
from megactx.evaluation.summary import check_targets, summarise
from megactx.evaluation.sums import loggable
from megactx.evaluation.validation import SpaceMetrics, ValidationMetrics
from megactx.framework.optimizers import MuonWithAdamW, warmup_cosine
from megactx.framework.resume import best, differences, read
from megactx.gist import GistNet
from megactx.gist.footprint import footprint, in_words
from megactx.gist.losses import contrastive
from megactx.gist.scoring import OBJECTIVES, score
from megactx.gist.substitution import blocks, check_blocks, rows_at, substituted, teach
from megactx.lm import BaseLM

log = logging.getLogger(__name__)


class GistStage(lightning.LightningModule):
    """GistNet training with a frozen base.

    Args:
        base: ``name`` of a Hugging Face model, folder or ``asset:NAME``.
        gistnet: keyword arguments of ``GistNet`` other than width and scale.
        controls: name -> keyword arguments of a GistNet that is trained beside the main one; ``None`` leaves it out.
        horizon: H, tokens.
        objective: ``kl`` or ``delta_nll``.
        contrastive: ``weight`` (lambda) and ``margin``.
        lr, min_lr, weight_decay, warmup, max_steps: AdamW with linear warm-up and a cosine over ``max_steps``.
        muon_lr: learning rate of Muon for the GistNet's matrices; ``None`` leaves all to AdamW. Controls keep AdamW,
            which measured better for them.
        targets: metric name -> number, printed beside the result.
        evaluate: what the end-of-run report measures. ``blocks``: about how many; ``controls``: the untrained controls
            too, or not; ``copies``: blocks per distance for copy recovery; ``level2``: spans of K^2 tokens that gists
            of gists replace; ``reconstruction``: steps of a decoder trained to tell what gists keep (0: none of it);
            ``path``: files to report on besides the held-out documents (``None``: only those).
        init: checkpoint or run folder that ``start_from`` reads before a fresh run; ``None`` starts from nothing.
    """

    monitor = "val/dnll"  # of which a new minimum is worth a checkpoint
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
    ):
        super().__init__()
        if not str(base["name"]).startswith("asset:"):
            base = base | {"name": resolve(base["name"])}  # absolute, so that a checkpoint loads from any folder
        self.save_hyperparameters()
        if objective not in OBJECTIVES:
            raise ValueError(f"stage.objective={objective} is not known, allowed are {', '.join(OBJECTIVES)}")
        check_targets(targets, horizon)
        self.base = BaseLM.from_pretrained(**base).freeze()
        width, rms = self.base.width, self.base.embedding_rms()
        self.nets = nn.ModuleDict({"gistnet": GistNet(width, rms, **gistnet)})
        for name, settings in controls.items():
            if settings is None:
                continue
            self.nets[name] = GistNet(width, rms, **settings)
            if self.nets[name].block_size != self.gistnet.block_size:
                raise ValueError(
                    f"stage.controls.{name}.block_size={self.nets[name].block_size} differs from "
                    f"gistnet.block_size={self.gistnet.block_size}: controls see the same blocks"
                )

    @property
    def gistnet(self) -> GistNet:
        return self.nets["gistnet"]

    def start_from(self, path: str) -> str:
        """Take the weights of another run's GistNet and of the controls that both have; -> what was taken.

        Args:
            path: a checkpoint, or a run folder, of which the best one counts.

        Raises:
            ValueError: there is none, or its GistNet has another architecture.
        """
        path = Path(path).expanduser()
        if not path.exists():
            raise ValueError(f"stage.init={path}: there is no such checkpoint or run folder")
        checkpoint = read(best(path) if path.is_dir() else path)
        there = {k.removeprefix("nets."): v for k, v in checkpoint["state_dict"].items() if k.startswith("nets.")}
        taken = []
        for name, net in self.nets.items():
            own = {k.removeprefix(f"{name}."): v for k, v in there.items() if k.startswith(f"{name}.")}
            shapes = {k: v.shape for k, v in net.state_dict().items()}
            if {k: v.shape for k, v in own.items()} == shapes:
                net.load_state_dict(own)
                taken.append(name)
            elif name == "gistnet":
                before = checkpoint["hyper_parameters"].get("gistnet", {})
                changes = "; ".join(differences(before, self.hparams.gistnet, "gistnet"))
                raise ValueError(
                    f"stage.init={path}: its GistNet has another architecture: {changes or 'see the base'}"
                )
        return f"Starting from {path}, step {checkpoint['global_step']}: {', '.join(taken)}"

    def setup(self, stage: str) -> None:
        # A frozen base needs no fp32 master weights: under bf16 its casts would be repeated at every call.
        mixed = str(self.trainer.precision).startswith("bf16")
        self.base.to(torch.bfloat16 if mixed else torch.float32)

    def on_fit_start(self) -> None:
        flops = ", ".join(f"{name} {net.flops_per_block() / 1e6:.1f}" for name, net in self.nets.items())
        log.info("MFLOP per block of %d tokens: %s", self.gistnet.block_size, flops)
        data = self.trainer.datamodule
        shape = (data.batch, data.max_tokens, data.spans, self.hparams.horizon)
        need = in_words(footprint(self.base, self.nets.values(), *shape, self.device.type))
        log.info("Memory of a step with %d documents of %d tokens: %s", data.batch, data.max_tokens, need)

    def substitution_loss(self, batch: dict):
        """-> (loss per net [C], numbers) over the sampled blocks of a batch."""
        ids, starts = batch["ids"], batch["starts"]
        block, horizon = self.gistnet.block_size, self.hparams.horizon
        check_blocks(starts, batch["lengths"], block, horizon)
        teacher = teach(self.base, ids)
        embedded = self.base.embed(blocks(ids, starts, block)).flatten(0, 1)
        gists = torch.stack([net.encode_span(embedded).view(*starts.shape, -1) for net in self.nets.values()])
        offsets = [net.offset for net in self.nets.values()]
        hidden = substituted(self.base, teacher, starts, gists, offsets, block, horizon)
        loss, numbers = score(
            self.base,
            hidden.flatten(1, 3),
            rows_at(teacher.hidden, starts + block - 1, horizon).flatten(0, 2),
            blocks(ids, starts + block, horizon).flatten(),
            self.hparams.objective,
        )
        return loss.mean(dim=1), numbers, gists

    def training_step(self, batch: dict, batch_index: int) -> Tensor:
        losses, numbers, gists = self.substitution_loss(batch)
        dnll = (numbers["nll"] - numbers["full"]).mean(dim=1)
        self.log("train/loss", losses[0].detach(), sync_dist=True)
        self.log("train/dnll", dnll[0], prog_bar=True, sync_dist=True)
        for index, name in enumerate(self.nets):
            if index:
                self.log(f"train/{name}/dnll", dnll[index], sync_dist=True)
        total = losses.sum()
        if weight := self.hparams.contrastive["weight"]:
            term = self._contrastive(batch, gists[0])
            self.log("train/contrastive", term.detach(), sync_dist=True)
            total = total + weight * term
        return total

    def _contrastive(self, batch: dict, gists: Tensor) -> Tensor:
        block = self.gistnet.block_size
        right = batch["starts"] + block
        paired = right + block <= batch["lengths"][:, None]
        # A block without a right neighbour gathers within the document, and is then left out.
        safe = torch.where(paired, right, batch["starts"])
        neighbours = self.base.embed(blocks(batch["ids"], safe, block))[paired]
        return contrastive(gists[paired], self.gistnet.encode_span(neighbours), self.hparams.contrastive["margin"])

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        for net in self.nets.values():  # a control's spike must not shrink the GistNet's step
            nn.utils.clip_grad_norm_(net.parameters(), gradient_clip_val or float("inf"))

    def on_validation_epoch_start(self) -> None:
        self.metrics = ValidationMetrics(self.hparams.horizon, self.base.width).to(self.device)

    def validation_step(self, batch: dict, batch_index: int) -> None:
        self.metrics.update(self.base, self.gistnet, batch)

    def on_validation_epoch_end(self) -> None:
        values = loggable(self.metrics.compute())
        shown = {"dnll", "recovery"}
        for name, value in values.items():
            self.log(f"val/{name}", value, prog_bar=name in shown)

    def configure_optimizers(self):
        h = self.hparams
        if h.muon_lr is None:
            optimizer = torch.optim.AdamW(
                self.nets.parameters(), lr=h.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=h.weight_decay
            )
        else:
            matrices = [p for p in self.gistnet.parameters() if p.ndim == 2]
            known = {id(p) for p in matrices}
            others = [p for p in self.nets.parameters() if id(p) not in known]
            optimizer = MuonWithAdamW(matrices, others, h.muon_lr, h.lr, h.weight_decay, betas=(0.9, 0.999))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, h.warmup, h.max_steps, h.min_lr / h.lr)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        # The frozen base is named in the hyperparameters; its weights do not belong into every checkpoint.
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith("base.")}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        own = {f"base.{k}": v for k, v in self.base.state_dict().items()}
        checkpoint["state_dict"] = {**own, **checkpoint["state_dict"]}

    def prepare(self, datamodule) -> None:
        """Tell the data how long a document the base takes."""
        datamodule.limit_to(self.base.max_positions)

    @torch.inference_mode()
    def finish(self, folder: Path, datamodule) -> None:
        """Report on held-out documents and on ``evaluate.path``: tables, pictures, scores; then the next command."""
        asked = self.hparams.evaluate
        curve = folder / "metrics.csv"
        decoder = None
        if steps := asked["reconstruction"]:
            training = (default_convert(datamodule.training[index]) for index in range(steps))
            decoder = train_decoder(self.base, self.gistnet, training)
        rest = (curve, decoder, datamodule.weights)
        self._report(folder, datamodule.evaluation_documents(asked["blocks"]), "held-out documents", *rest)
        if asked["path"]:
            other = folder / "other"
            other.mkdir(exist_ok=True)
            given = datamodule.held_out(Files(asked["path"]), asked["blocks"])
            self._report(other, given, asked["path"], *rest)
        print(
            "Next: python train.py experiment=gist_stage2 preset=demo, or add gistnet.head=linear pooling=cls depth=d4"
        )

    @staticmethod
    def conclude(folder: Path, stages: list[str]) -> None:
        """The end of a curriculum: all its stages in one table and one picture."""
        write_curriculum(folder, stages)

    def _report(self, folder: Path, batches: list[dict], what: str, curve: Path, decoder, weights: dict) -> None:
        asked, horizon = self.hparams.evaluate, self.hparams.horizon
        extra = {"weights": weights}
        with self._autocast():
            measured = (self.base, self.nets, batches)
            settings = {
                "with_controls": asked["controls"],
                "progress": partial(track, description=f"measuring {what}", disable=not sys.stdout.isatty()),
            }
            scores = measure(*measured, horizon, **settings)
            if asked["copies"]:
                extra["copies"] = measure_copies(*measured, blocks=asked["copies"], **settings)
            if asked["level2"]:
                extra["level2"] = measure_level(*measured, horizon, blocks=asked["level2"], **settings)
            geometry = self._geometry(batches)
        if decoder:
            geometry |= reconstruction(self.base, self.gistnet, decoder, batches)
        scores.save(folder / "scores")
        numbers = summarise(scores, targets=self.hparams.targets, geometry=geometry, **extra)
        numbers["flops_per_block"] = {name: net.flops_per_block() for name, net in self.nets.items()}
        print(f"\nResult on {what}")
        print_report(numbers)
        write_report(folder, numbers)
        plot_run(folder / "report.png", scores, curve if curve.exists() else None)
        print(f"Tables: {folder / 'report.md'}   picture: {folder / 'report.png'}")

    def _geometry(self, batches: list[dict]) -> dict:
        metric = SpaceMetrics(self.base.width).to(self.device)
        for batch in batches:
            metric.update(self.base, self.gistnet, batch)
        return {name: value.item() for name, value in metric.compute().items()}

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.base.model.dtype == torch.bfloat16)
