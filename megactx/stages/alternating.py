"""Stage ``alternating``: GistNet, LensNet and LoRA on the base LM learn in turn, in cycles (method 12).

    cycle 1   [ GistNet ][ fresh labels, LensNet ][ LoRA ]   cycle 2   [ GistNet ][ fresh labels, LensNet ] ...

GistNet learns by packed substitution, as in the gist stage: branches are read by the base LM as it is now, and compared
with the untouched one. LensNet learns from the values of edits, as in the lens stage: they are measured anew in each
cycle, for gists and the reader have changed. The adapters learn to read windows, also those that LensNet chooses.

Which part learns is a function of the step. So is everything else but the measured windows, which are files.
"""

import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from megactx.data.joint_module import PICKS, SPANS, WINDOWS
from megactx.focus.allocator import FocusAllocator
from megactx.focus.label_files import load
from megactx.focus.packed import Windows, accumulated, continuation_loss, encode_shown
from megactx.focus.sampling import KINDS, draw
from megactx.focus.window_variants import same_rows
from megactx.framework.config.types import AtLeast2, Count, Whole
from megactx.framework.files import IN_RUN, replacing
from megactx.gist.loss import Context
from megactx.gist.losses.block import Block
from megactx.lm.adapters import adapters_of

from .joint import JointStage
from .lens_labels import ensure, folder_of, measuring_flops, sizes_ahead
from .lens_losses import value_losses
from .phases import Place, Schedule
from .window_work import WindowWork
from .work import Work

log = logging.getLogger(__name__)

WHO = {"gist": "GistNet", "lens": "LensNet", "lora": "LoRA"}
NEEDS = {"gist": SPANS, "lens": PICKS, "lora": WINDOWS}  # phase -> kind of batch


class WindowsPerCycle(TypedDict):
    """Measured windows of a LensNet phase, and edits of each."""

    per_round: AtLeast2
    edits: AtLeast2


class AlternatingStage(JointStage):
    """Cycles of GistNet steps, fresh labels, LensNet steps and LoRA steps.

    Args:
        cycles: how many, at most: a plateau ends the run before.
        steps: ``gist``, ``lens``, ``lora``: steps of each phase in a cycle; 0 leaves it out.
        windows: ``per_round``: measured at the start of each LensNet phase; ``edits``: measured per window.
        settings: of ``JointStage``.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    gistnet_learns = True

    def __init__(self, cycles: Count, steps: dict[str, Whole], windows: WindowsPerCycle, **settings):
        schedule = Schedule(dict(steps), cycles)
        own = "lora" if steps["lora"] else "frozen"
        if settings.get("train_base", own) != own:
            raise ValueError(f"stage.train_base={settings['train_base']}: stage.steps.lora={steps['lora']} says {own}")
        super().__init__(**settings | {"train_base": own})
        self.schedule, self.block_loss = schedule, Block(objective=self.hparams.objective)
        self._windows_before: Path | None = None
        self._begun = self._measured = None  # the phase that was told of, the cycle whose windows were counted

    def flops_ahead(self, data: dict, preset: dict) -> float:
        """About how many floating-point operations the training takes; ``data`` and ``preset`` are of the config."""
        steps, (body, tokens, window) = self.schedule.steps, sizes_ahead(self, data)
        gist = data["documents"] * 2 * body * (2 * tokens + 2 * data["spans"] * self.hparams.horizon)
        lora = data["documents"] * 2 * body * (2 * tokens + 3 * window)
        cycle = measuring_flops(self, data, self.hparams.windows["per_round"])
        return self.schedule.cycles * (cycle + steps["gist"] * gist + steps["lora"] * lora)

    @property
    def place(self) -> Place:
        """Where the step that comes next lies."""
        return self.schedule.at(self.global_step)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        every, total = self.trainer.accumulate_grad_batches, self.schedule.cycle * self.schedule.cycles
        if self.trainer.max_steps != total and not self.trainer.fast_dev_run:
            raise ValueError(
                f"trainer.max_steps={self.trainer.max_steps}: stage.cycles and stage.steps make {total}; leave it"
            )
        self.data.kind_at = lambda index: NEEDS[self.schedule.at(index // every).phase]

    def flops(self, batch: dict) -> float | Tensor:
        """Of the step that was just taken, what was measured for it included."""
        work, total = WindowWork.of(self), 0.0
        if SPANS in batch:
            sizes = (work.body, work.head, work.attention)
            gists = Work(*sizes, 1, self.hparams.horizon, work.net, work.block, (Block(),))
            total += gists(batch[SPANS])
            if adapters_of(self.base):  # the reader and its teacher are two
                lengths = batch[SPANS]["lengths"].double()
                total += 2 * work.body * lengths.sum() + 2 * work.attention * lengths.square().sum()
        if PICKS in batch:
            total += 3 * work.lensnet(*self._read) + sum(work.measured(*sizes) for sizes in self.measured)
        for number, document in enumerate(documents := batch.get(WINDOWS, [])):
            cursor, text = document["cursor"], batch["index"] * len(documents) + number
            horizon = len(document["ids"]) - cursor
            total += work.tree(cursor) + work.full(cursor, horizon)
            total += work.window(self.budget(cursor, text), horizon)
        return total

    def on_train_batch_start(self, batch, batch_index: int) -> None:
        self.measured.clear()

    def training_step(self, batch: dict, batch_index: int) -> Tensor:
        place = self.place
        self.learns(place.phase)
        if place.position == 0 and self._begun != place:  # not once more for each batch of its first step
            self._begun = place
            log.info("Cycle %d of %d: %s learns", place.cycle + 1, self.schedule.cycles, WHO[place.phase])
        return getattr(self, f"{place.phase}_step")(batch[NEEDS[place.phase]], place, batch.get("index", 0))

    def gist_step(self, batch: dict, place: Place, index: int) -> Tensor:
        """Packed substitution of single blocks."""
        nets = {"gistnet": self.gistnet}
        context = Context(self.base, nets, self.prefill(batch["ids"]), batch, self.hparams.horizon)
        losses, dnll = self.block_loss.per_net(context)
        self.count_tokens(batch["lengths"].sum())
        self.log("train/gist/loss", losses[0].detach())
        self.log("train/gist/dnll", dnll[0].detach(), prog_bar=True)
        return losses[0]

    def lens_step(self, picks: Tensor, place: Place, index: int) -> Tensor:
        """Measured values of edits."""
        paths = self._windows(place)
        chosen = [paths[i] for i in (picks.double().cpu() * len(paths)).long().tolist()]
        batch = load(chosen, self.base)
        self._read = tuple(batch.mask.shape)
        losses = value_losses(self.lens, batch, learn=True)
        for name, loss in losses.items():
            self.log(f"train/lens/{name}", loss.detach(), prog_bar=name == "loss")
        return losses["loss"]

    def lora_step(self, documents: list[dict], place: Place, index: int) -> Tensor:
        """Windows of all kinds, read by the base LM with its adapters."""
        hparams = self.hparams

        def run(number: int, _) -> tuple[Tensor, Tensor]:
            document = documents[number]
            ids, cursor = document["ids"][None], document["cursor"]
            text = index * len(documents) + number
            with torch.no_grad():
                prefill = self.document(ids[:, :cursor])
                windows = self._window(prefill, KINDS[text % len(KINDS)], self.budget(cursor, text), text)
                gists = encode_shown(self.gistnet, self.base, prefill, windows.nodes, False)
            targets, full = ids[0, cursor:], self.full(ids, cursor)
            hidden = windows.read(self.base, gists, targets, self.gistnet)
            loss, nll = continuation_loss(self.base, hidden, full, targets, hparams.objective)
            return loss.mean() / len(documents), nll.mean(1)

        nothing = torch.zeros(0, device=self.device)
        loss, nll = accumulated(run, range(len(documents)), nothing, [self.base])
        self.count_tokens(sum(len(document["ids"]) for document in documents))
        self.log("train/lora/loss", loss.detach(), prog_bar=True)
        self.log("train/lora/nll", nll.mean())
        return loss

    def _window(self, prefill, kind: str, budget: int, text: int) -> Windows:
        generator = torch.Generator().manual_seed(self.data.seed * 2**32 + text)
        (tree,) = same_rows(self.gistnet, self.base, prefill, 1)
        allocator = FocusAllocator(**self.hparams.allocator)
        try:
            return Windows.of(draw(kind, tree, budget, generator, self.lens, allocator))
        except ValueError as error:
            raise ValueError(f"stage.budgets={list(self.hparams.budgets)}: {error}; take larger shares") from error

    def _windows(self, place: Place) -> list[Path]:
        """The measured windows of this cycle; at its first LensNet step they are made."""
        folder, count = Path(self.hparams.folder), self.hparams.windows["per_round"]
        own = folder_of(folder, place.cycle)
        if place.position and self._windows_before and not own.exists():
            # Resumed in another folder: made again now, they would be those of a LensNet that has learned from them.
            if (before := folder_of(self._windows_before, place.cycle)).exists():
                with replacing(own, IN_RUN) as part:
                    shutil.copytree(before, part)
        if not place.position and self._measured != place.cycle:  # once, however many batches its first step has
            self._measured = place.cycle
            keys = ([place.cycle, index] for index in range(count))
            self.count_tokens(sum(len(self.data.training_document(key)["ids"]) for key in keys))
        return ensure(self, self.data, folder, place.cycle, count)

    def own_steps(self, step: int, part: str) -> tuple[int, int]:
        return self.schedule.before(step, part), self.schedule.steps[part] * self.schedule.cycles

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["place"] = asdict(self.schedule.at(checkpoint["global_step"]))
        checkpoint["windows"] = str(Path(self.hparams.folder).absolute())

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        super().on_load_checkpoint(checkpoint)
        if "place" in checkpoint:
            now, then = asdict(self.schedule.at(checkpoint["global_step"])), checkpoint["place"]
            if now != then:
                raise ValueError(
                    f"stage.steps={self.schedule.steps}: the checkpoint stands at {then}, with these it would be {now};"
                    " set them as they were"
                )
            self._windows_before = Path(checkpoint["windows"])
