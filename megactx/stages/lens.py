"""Stage ``lens``: train a LensNet on measured values of detail, against a frozen base LM and GistNet (method 10).

Training goes in rounds. At the start of each, windows are drawn from training documents, among them some that the
LensNet of the moment arrives at, and the values of their edits are measured and kept in the run folder. Between, the
LensNet learns from the windows of all rounds so far: measuring is what costs, so nothing measured is used only once.
"""

from pathlib import Path
from typing import Annotated, TypedDict

import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from megactx.focus.allocator import FocusAllocator
from megactx.focus.label_files import load
from megactx.focus.lensnet import LensNet
from megactx.focus.objectives import value_loss
from megactx.framework.config.types import ArgumentsOf, AtLeast2, Count, NonNegative, PartOf, Whole
from megactx.memory.pyramid import Attention
from megactx.parts.read import gistnet_of

from .lens_labels import HELD, ensure, measuring_flops, sizes_ahead
from .lens_losses import value_losses
from .lens_report import check_windows, report
from .stage import BaseSettings, FocusEvaluate, FrozenBaseStage, of_today, portable, portable_part
from .window_work import WindowWork


class MeasuredWindows(TypedDict):
    """Windows of a round, rounds, and edits that are measured of each window."""

    per_round: AtLeast2
    rounds: Count
    edits: AtLeast2


class LensStage(FrozenBaseStage):
    """LensNet training.

    Args:
        base: ``name`` and ``dtype`` of the base LM.
        gistnet: a GistNet to make trees with: ``asset:NAME``, a folder of ``save_gistnet``, a run folder or a
            checkpoint of a gist stage.
        lensnet: keyword arguments of ``LensNet`` other than width and block size.
        allocator: keyword arguments of ``FocusAllocator``.
        horizon: H, scored tokens behind a window.
        budgets: entries of a window over the tokens that it stands for; windows have them in turn.
        windows: ``per_round`` and ``rounds``; ``edits``, measured per window.
        lr, min_lr, weight_decay, warmup, max_steps: AdamW with linear warm-up and a cosine over ``max_steps``.
        direct_lr: peak for LensNet's few weights from its features to the values, see ``LensNet``.
        evaluate: of the end-of-run report, see ``configs/stage/lens.yaml``.
        folder: where the measured windows are kept.
        attention: keyword arguments of ``Attention``, by which windows are read; ``None``: plain.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    # Few values make up most of a validation's loss, so which checkpoint has the lowest is chance: the last one counts.
    monitor = None
    takes = {"base": "base.name", "gistnet": "stage.gistnet"}
    gives = {"lens": ""}
    one_process = True
    gistnet_learns = False

    def __init__(
        self,
        base: BaseSettings,
        gistnet: str,
        lensnet: Annotated[dict, ArgumentsOf(LensNet)],
        allocator: Annotated[dict, ArgumentsOf(FocusAllocator)],
        horizon: Count,
        budgets: list[PartOf],
        windows: MeasuredWindows,
        lr: NonNegative,
        direct_lr: NonNegative,
        min_lr: NonNegative,
        weight_decay: NonNegative,
        warmup: Whole,
        max_steps: Count,
        evaluate: FocusEvaluate,
        folder: str,
        attention: Annotated[dict, ArgumentsOf(Attention)] | None = None,
    ):
        super().__init__()
        base, gistnet = base | {"name": portable(base["name"])}, portable_part(gistnet)
        allocator = of_today(allocator)
        self.save_hyperparameters()
        self.check_settings()
        self.take_base(base)
        self.gistnet = gistnet_of(gistnet, self.base, "stage.gistnet", self.base_record).requires_grad_(False)
        self.attention = Attention(**attention or {}).check(self.gistnet.block_size)
        self.lens = LensNet(self.base.width, self.gistnet.block_size, **lensnet)
        self.measured: list[tuple] = []  # since the last step: see ``lens_labels.ensure``
        self.window_files: dict[tuple[Path, int], list[Path]] = {}  # that are known to be there, likewise
        self.learned_from: list[tuple[int, int]] = []  # windows and entries of the step

    def flops_ahead(self, data: dict, preset: dict) -> float:
        h, learned = self.hparams, sum(p.numel() for p in self.lens.parameters())
        read = 6 * learned * sizes_ahead(self, data)[2] * data["batch"] * h.max_steps
        return measuring_flops(self, data, h.windows["per_round"] * h.windows["rounds"]) + read

    def prepare(self, datamodule) -> None:
        self.fit_data(datamodule, self.gistnet.block_size, self.hparams.horizon)

    check_lengths = staticmethod(check_windows)

    def session_parts(self):
        return {"gistnet": self.gistnet, "lensnet": self.lens}

    def train(self, mode: bool = True) -> "LensStage":
        super().train(mode)
        self.gistnet.eval()  # frozen: no dropout
        return self

    def round_at(self, step: int) -> int:
        """Rounds are equally long parts of ``max_steps``."""
        rounds = self.hparams.windows["rounds"]
        return min(step * rounds // self.hparams.max_steps, rounds - 1)

    def flops(self, picks: Tensor) -> float:
        work = WindowWork.of(self)
        read = sum(3 * work.lensnet(*sizes) for sizes in self.learned_from)
        return read + sum(work.measured(*sizes) for sizes in self.measured)

    def on_train_batch_start(self, batch, batch_index: int) -> None:
        self.measured.clear()
        self.learned_from.clear()

    def training_step(self, picks: Tensor, batch_index: int) -> Tensor:
        folder, count, paths = Path(self.hparams.folder), self.hparams.windows["per_round"], []
        for number in range(self.round_at(self.global_step) + 1):
            paths += ensure(self, self.trainer.datamodule, folder, number, count)
        chosen = (picks.double().cpu() * len(paths)).long().tolist()
        batch = load([paths[i] for i in chosen], self.base)
        self.learned_from.append(tuple(batch.mask.shape))
        losses = value_losses(self.lens, batch, learn=True)
        for name, loss in losses.items():
            self.log(f"train/{name}", loss.detach(), prog_bar=name == "loss")
        return losses["loss"]

    @property
    def parts(self) -> dict:
        return {"lens": list(self.lens.parameters())}

    def on_validation_epoch_start(self) -> None:
        self.found = []

    def validation_step(self, indices: Tensor, batch_index: int) -> None:
        count = self.trainer.datamodule.validation_windows
        paths = ensure(self, self.trainer.datamodule, Path(self.hparams.folder), HELD, count)
        batch = load([paths[i] for i in indices.tolist()], self.base)
        values = self.lens(batch.embeddings, batch.lods, batch.distance, batch.mask, batch.mean_embeddings)
        estimates = batch.estimates(values, self.lens.block_size)
        self.found.append((estimates, batch.labels))

    def on_validation_epoch_end(self) -> None:
        estimates, values = (torch.cat(part).float() for part in zip(*self.found, strict=True))
        loss = value_loss(estimates, values)
        self.log("val/huber", loss)
        self.log("val/loss", loss, prog_bar=True)
        self.log("val/rank_correlation", spearman_corrcoef(estimates, values), prog_bar=True)

    def groups(self) -> list[dict]:
        h = self.hparams
        direct = list(self.lens.direct.parameters())
        known = {id(p) for p in direct}
        rest = [p for p in self.lens.parameters() if id(p) not in known]
        groups = [{"params": rest, "lr": h.lr}, {"params": direct, "lr": h.direct_lr}]
        return [group | {"weight_decay": h.weight_decay} for group in groups]

    @torch.no_grad()
    def finish(self, folder: Path, datamodule) -> None:
        """What focus is worth on held-out documents: tables, pictures, numbers."""
        self.eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            report(self, folder, datamodule)
