"""What a stage is: all that the framework asks of one, declared, with what most stages answer."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NotRequired, TypedDict

import lightning
import torch
from torch import Tensor, nn

from megactx.assets import resolve
from megactx.framework.config.types import Count, PartOf, Whole, check
from megactx.framework.optimizers import MuonWithAdamW, floor_of, warmup_cosine
from megactx.gist import GistNet
from megactx.lm import BaseLM
from megactx.lm.identity import record_of
from megactx.memory.pyramid import PLAIN
from megactx.parts.find import refuse_other_base
from megactx.parts.read import gistnet_of
from megactx.runtime.settings import note_on

from .chain_page import write_page

log = logging.getLogger(__name__)

STATES = ("state_dict", "current_model_state")  # the second where weights are averaged: those that go on training


class BaseSettings(TypedDict):
    """Of a stage: the base LM."""

    name: str
    dtype: NotRequired[str | None]


class FocusEvaluate(TypedDict, total=False):
    """Of the stages that read windows: what the end-of-run report measures of them."""

    documents: Count
    tokens: Count | None
    budgets: list[PartOf]
    oracle: Whole
    planted: Whole
    path: str | None


class Stage(lightning.LightningModule):
    """A training: one optimizer, and a warm-up and cosine per group of parameters.

    A stage says what learns (``groups``), in which parts gradients are clipped (``parts``), and what is found at the
    end (``finish``). Attributes, all of the class:

        monitor        logged value of which a new minimum is worth a checkpoint; ``None``: none
        reports_best   that checkpoint is what the report is of, and what the next stage starts from
        timed          ``preset.minutes`` may decide how many steps there are: they are all alike
        takes          of a curriculum's earlier stages: name of what they give -> the setting that it is for
        gives          to later ones: name -> its place in the run folder, "" for the run itself
        stock          it is part of the stock chain, ``megacontext=none``: it makes and reads no gists
        one_process    it cannot be trained by several processes
        shorter        what makes its training short, for the line that says how long it takes
    """

    monitor: str | None = None
    reports_best = False
    timed = False
    takes: ClassVar[dict[str, str]] = {}
    gives: ClassVar[dict[str, str]] = {}
    stock = False
    one_process = False
    shorter = "preset=demo is a matter of minutes"
    betas = (0.9, 0.999)  # of AdamW

    # What a stage says of itself

    def groups(self) -> list[dict]:
        """Groups of parameters of the optimizer: ``params``, ``lr`` (peak), ``weight_decay``, ``muon``, ``part``."""
        h = self.hparams
        return [{"params": list(self.parameters()), "lr": h.lr, "weight_decay": h.weight_decay}]

    def factor(self, step: int, group: dict) -> float:
        """Of the peak learning rate of a group at an optimizer step: warm-up and cosine over ``max_steps``."""
        h = self.hparams
        return warmup_cosine(step, h.warmup, h.max_steps, floor_of(h.min_lr, h.lr))

    @property
    def parts(self) -> dict[str, list[nn.Parameter]]:
        """name -> parameters that are clipped together: one part's spike must not shrink another's step."""
        return {"all": [p for group in self.groups() for p in group["params"]]}

    def prepare(self, datamodule) -> None:
        """Before training and before texts are read: tell the data what the models take.

        Raises:
            ValueError: the data and the models contradict each other.
        """

    def check_data(self, datamodule) -> None:
        """See that the data, which is set up, has what the losses need.

        Raises:
            ValueError: it has not; it names the setting.
        """
        self.check_lengths(self.hparams, datamodule)

    @staticmethod
    def check_lengths(settings, datamodule) -> None:
        """See that the data, which is set up, fits the settings of this stage, which is not built yet: what it is built
        from may still have to be trained.

        Raises:
            ValueError: it does not; it names the setting.
        """

    @staticmethod
    def base_of(settings) -> dict | None:
        """The record of the base LM that settings of this stage name; ``None``: its checkpoints hold no record.

        Raises:
            ValueError: it cannot be loaded.
        """
        return None

    def start_from(self, path: str) -> str:
        """Take the weights of another run; -> what was taken.

        Raises:
            ValueError: there are none that fit.
        """
        raise ValueError(f"stage.init={path} is not allowed: this stage starts from nothing else; leave it out")

    def finish(self, folder: Path, datamodule) -> None:
        """The end of the run: report into its folder, and print the next command."""

    @staticmethod
    def conclude(folder: Path, stages: list[str]) -> None:
        """The end of a curriculum whose last stage this is: a page about all of them."""
        write_page(folder, stages)

    def flops_ahead(self, data: dict, preset: dict) -> float:
        """About how many floating-point operations the training takes; ``data`` and ``preset`` are of the config."""
        return 0.0  # which says nothing

    def flops(self, batch) -> Tensor | float:
        """Floating-point operations of the step that was just taken, for the MFU; 0: not known."""
        return 0.0

    def amounts(self, batch) -> dict[str, Tensor | int]:
        """What a batch is in ``tokens``, ``documents`` and ``spans``, for the speed; empty where in none of these."""
        return {}

    def loss_settings(self, name: str) -> dict:
        """Of a loss of this stage; empty where it has none of that name."""
        return {}

    def session_parts(self) -> dict[str, nn.Module | None]:
        """What a session with these models reads with beside the base LM, by the names of ``Models``."""
        return {}

    # What all of them do

    def check_settings(self) -> None:
        """See that the hyperparameters are what the annotations of the arguments say.

        Raises:
            ValueError: a line for each that is not.
        """
        groups = {name: name for name in ("gistnet", "lensnet", "allocator")}
        check(type(self), self.hparams, "stage", groups | {"horizon": "horizon.tokens", "losses": "loss"})

    def setup(self, stage: str) -> None:
        if self.one_process and self.trainer.world_size > 1:
            raise ValueError(f"trainer.devices={self.trainer.world_size}: this stage trains in one process")

    def on_fit_start(self) -> None:
        self.check_data(self.trainer.datamodule)

    def configure_optimizers(self):
        optimizer = MuonWithAdamW(self.groups(), self.betas)
        # A peak is read before the schedule writes to it.
        factors = [lambda step, group=dict(group): self.factor(step, group) for group in optimizer.param_groups]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        for parameters in self.parts.values():
            if parameters:
                nn.utils.clip_grad_norm_(parameters, gradient_clip_val or float("inf"))


class FrozenBaseStage(Stage):
    """A stage with a base LM that is frozen, or of which adapters learn: it is in no checkpoint as a whole.

    ``train_base``: what of the base LM learns, ``frozen``, ``lora`` or ``full``. ``attention``: how windows are read.
    ``kept_layers``: of the prefills of training documents that it may keep, see ``PrefillCache``; ``None``: it keeps
    none.
    """

    train_base = "frozen"
    attention = PLAIN
    kept_layers: Sequence[int] | None = None
    base: BaseLM
    half = False  # trained in bf16

    def take_base(self, base: dict) -> None:
        """Load the frozen base LM: ``name`` and ``dtype``."""
        self.base = BaseLM.from_pretrained(**base).freeze()
        self.base_record = record_of(self.base, base["name"])  # as it is before it learns

    @staticmethod
    def base_of(settings) -> dict | None:
        return record_of(BaseLM.from_pretrained(**settings["base"]), settings["base"]["name"])

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.half = str(self.trainer.precision).startswith("bf16")
        self.set_dtype(torch.bfloat16 if self.half else torch.float32)

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Of the base: a frozen one needs no fp32 master weights, whose casts would be repeated at every call."""
        self.base.to(dtype)

    def fit_data(self, datamodule, block_size: int, horizon: int | None = None) -> None:
        """Tell the data how many positions the base has, and the reader what sessions with such a base can do.

        Raises:
            ValueError: blocks of another size, or another horizon.
        """
        datamodule.limit_to(self.base.max_positions)
        if note := note_on(block_size, self.base.max_positions):
            log.warning("Sessions of what is trained here: %s", note)
        if horizon not in (None, datamodule.horizon):
            raise ValueError(f"horizon.tokens: stage has {horizon}, the data has {datamodule.horizon}")
        if datamodule.block != block_size:
            raise ValueError(
                f"block_size: the compressor has {block_size}, the data has {datamodule.block}; set block_size=, which"
                " is for both"
            )

    def kept_of_base(self) -> set[str]:
        """Names of the base LM's tensors that a checkpoint must hold, for they are trained."""
        return set()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """A frozen base is named in the hyperparameters; its weights do not belong into every checkpoint."""
        kept = {f"base.{name}" for name in self.kept_of_base()}
        for states in set(STATES) & checkpoint.keys():
            found = checkpoint[states].items()
            checkpoint[states] = {k: v for k, v in found if not k.startswith("base.") or k in kept}
        checkpoint["base"] = self.base_record

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Put the base back.

        Raises:
            ValueError: the checkpoint was trained with another one, so it is worth nothing with this one.
        """
        refuse_other_base(checkpoint, self.base_record)
        own = {f"base.{k}": v for k, v in self.base.state_dict().items()}
        for states in set(STATES) & checkpoint.keys():
            checkpoint[states] = {**own, **checkpoint[states]}


class GistReaderStage(FrozenBaseStage):
    """A stage over whole documents, with a frozen base LM and the frozen GistNet whose gists it is about."""

    gistnet: GistNet

    def take_models(self, base: dict, gistnet: str) -> None:
        """Load both: ``name`` and ``dtype`` of the base LM, and an asset, a folder, a run or a checkpoint."""
        self.take_base(base)
        self.gistnet = gistnet_of(gistnet, self.base, "stage.gistnet", self.base_record).requires_grad_(False).eval()

    def train(self, mode: bool = True):
        super().train(mode)
        self.gistnet.eval()
        return self

    def prepare(self, datamodule) -> None:
        self.fit_data(datamodule, self.gistnet.block_size)

    def flops_ahead(self, data: dict, preset: dict) -> float:
        tokens = data["max_tokens"] or self.base.max_positions
        batch = {"lengths": torch.full((data["batch"],), tokens)}
        return float(self.flops(batch)) * preset["accumulate"] * self.hparams.max_steps

    def amounts(self, batch: dict) -> dict:
        return {"tokens": batch["lengths"].sum(), "documents": len(batch["ids"])}


def portable(name: str) -> str:
    """A base LM's name that means the same from any folder, as a checkpoint may be loaded from any."""
    return name if str(name).startswith("asset:") else resolve(name)


def portable_part(path: str | None) -> str | None:
    """The same of a trained GistNet or LensNet, which may be a checkpoint."""
    return path if path is None or path.startswith("asset:") else str(Path(path).expanduser().absolute())


def of_today(allocator: dict) -> dict:
    """Settings of an allocator; checkpoints of earlier days name a ``kind`` too, which the temperature says now."""
    return {name: value for name, value in allocator.items() if name != "kind"}
