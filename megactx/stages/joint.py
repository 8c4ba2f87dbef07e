"""What the stages share in which GistNet, LensNet and the base LM learn together (method 12).

They are judged by what counts in the end: windows of a fixed budget, chosen by LensNet from gists of GistNet, read by
the base LM with whatever it has learned. ``val/cost`` is the NLL of the tokens behind such windows, less that of the
untouched base LM over the full context, in nats per token.
"""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, TypedDict

import torch
from torch import Tensor, nn

from megactx.evaluation.focus import focused
from megactx.focus.allocator import FocusAllocator
from megactx.focus.edit_labels import continuation_nll
from megactx.focus.lensnet import LensNet
from megactx.focus.window_variants import same_rows
from megactx.framework.config.types import ArgumentsOf, Count, NonNegative, PartOf, Whole
from megactx.framework.optimizers import floor_of, warmup_cosine
from megactx.lm import BaseLM
from megactx.lm.adapters import adapt, adapters_of, switched_off
from megactx.lm.chunked_head import OBJECTIVES, nll
from megactx.lm.prefill import Prefill, prefill, unread
from megactx.parts.read import gistnet_of, lensnet_of

from .joint_report import report
from .lens_report import check_windows
from .stage import BaseSettings, FocusEvaluate, FrozenBaseStage, of_today, portable, portable_part
from .taking import take_parts

TRAIN_BASE = ("frozen", "lora", "full")


class Lora(TypedDict):
    """Adapters of the base LM, see ``adapt``."""

    rank: Whole
    layers: str
    embeddings: bool


class JointStage(FrozenBaseStage):
    """GistNet, LensNet and a base LM that may learn too.

    Args:
        base: ``name`` and ``dtype`` of the base LM.
        gistnet: the GistNet to start with: ``asset:NAME``, a folder of ``save_gistnet``, a run folder or a checkpoint.
        lensnet: keyword arguments of ``LensNet`` other than width and block size.
        lens: the first LensNet, of that GistNet: ``asset:NAME``, a folder of ``save_lensnet``, a run folder or a
            checkpoint of a lens stage; ``None``: a new one.
        init: a run folder or checkpoint of a joint or lens stage, from which all parts are taken, so that ``lens``
            does not count; ``None``: none.
        allocator: keyword arguments of ``FocusAllocator``.
        lora: ``rank`` (0: no adapters), ``layers`` and ``embeddings``, see ``adapt``.
        train_base: ``frozen``, ``lora`` or ``full``: what of the base LM may learn.
        horizon: H, scored tokens behind a block or a window.
        objective: ``kl`` (the untouched base LM over the full context teaches) or ``delta_nll`` (the true tokens do).
        budgets: entries of a window over the tokens that it stands for; windows have them in turn.
        gist_lr, muon_lr, lens_lr, direct_lr, base_lr: peaks; ``muon_lr`` is of GistNet's matrices, ``None`` leaves them
            to AdamW; ``direct_lr`` of LensNet's few weights from its features to the values.
        min_lr, weight_decay, warmup: of all; a part's warm-up and cosine count its own steps.
        evaluate: of the end-of-run report, as of the lens stage.
        folder: where measured windows are kept.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    monitor = "val/cost"
    takes = {"base": "base.name", "gistnet": "stage.gistnet", "lens": "stage.init", "parts": "stage.init"}
    gives = {"parts": ""}
    reports_best = one_process = True

    def __init__(
        self,
        base: BaseSettings,
        gistnet: str,
        lensnet: Annotated[dict, ArgumentsOf(LensNet)],
        allocator: Annotated[dict, ArgumentsOf(FocusAllocator)],
        lora: Lora,
        horizon: Count,
        objective: Literal[OBJECTIVES],
        budgets: list[PartOf],
        gist_lr: NonNegative,
        muon_lr: NonNegative | None,
        lens_lr: NonNegative,
        direct_lr: NonNegative,
        base_lr: NonNegative,
        min_lr: NonNegative,
        weight_decay: NonNegative,
        warmup: Whole,
        evaluate: FocusEvaluate,
        folder: str,
        train_base: Literal[TRAIN_BASE] = "frozen",
        lens: str | None = None,
        init: str | None = None,
    ):
        super().__init__()
        base = base | {"name": portable(base["name"])}
        gistnet, lens, allocator = portable_part(gistnet), portable_part(lens), of_today(allocator)
        self.save_hyperparameters()
        self.check_settings()
        if train_base == "lora" and not lora["rank"] or train_base == "full" and lora["rank"]:
            wanted = "from 4 to 16" if train_base == "lora" else "0"
            raise ValueError(
                f"stage.lora.rank={lora['rank']} is not allowed with stage.train_base={train_base}: {wanted}"
            )
        self.take_base(base)
        self.gistnet = gistnet_of(gistnet, self.base, "stage.gistnet", self.base_record)
        if lens is None or init:
            self.lens = LensNet(self.gistnet.width, self.gistnet.block_size, **lensnet)
        else:
            self.lens = lensnet_of(lens, self.gistnet, self.base_record, "stage.lens", lensnet)
        self._reference: tuple[BaseLM, ...] = ()  # not a submodule: it is in no checkpoint
        if lora["rank"]:
            adapt(self.base, **lora)
        if train_base == "full":
            self.base.float()
            self._reference = (BaseLM.from_pretrained(**base).freeze(),)
        self.measured: list[tuple] = []  # since the last step: see ``lens_labels.ensure``
        self.window_files: dict[tuple[Path, int], list[Path]] = {}  # that are known to be there, likewise
        self.learning: tuple[str, ...] = ()
        self.learns(*self.parts)
        # Tokens of documents that were learned from or measured with: what a comparison must hold fixed.
        self._new_tokens: int | Tensor = 0  # of the batch
        self._before: dict[int, Tensor] = {}  # NLL of held-out documents by the untouched base LM, which stays as it is
        self.register_buffer("tokens", torch.zeros((), dtype=torch.long))

    @property
    def train_base(self) -> str:
        return self.hparams.train_base

    @property
    def parts(self) -> dict[str, list[nn.Parameter]]:
        """What may learn: part -> parameters."""
        return {
            "gist": list(self.gistnet.parameters()),
            "lens": list(self.lens.parameters()),
            "lora": self.base_parameters(),
        }

    def base_parameters(self) -> list[nn.Parameter]:
        """Those of the base LM that may learn."""
        found = {"frozen": [], "lora": list(adapters_of(self.base).values()), "full": list(self.base.parameters())}
        return found[self.train_base]

    def learns(self, *names: str) -> None:
        """From now on these parts learn, the others are frozen: no gradient, no dropout."""
        self.learning = names
        self.base.requires_grad_(False)
        for name, parameters in self.parts.items():
            for parameter in parameters:
                parameter.requires_grad_(name in names)
        self.gistnet.train(self.training and "gist" in names)
        self.lens.train(self.training and "lens" in names)

    def train(self, mode: bool = True) -> "JointStage":
        super().train(mode)
        self.learns(*self.learning)
        return self

    @contextmanager
    def original(self) -> Iterator[BaseLM]:
        """The untouched base LM, without gradients."""
        with torch.no_grad():
            if self._reference:
                yield self._reference[0]
            else:
                with switched_off(self.base) as base:
                    yield base

    def start_from(self, path: str) -> str:
        """Take all parts of another joint run, or GistNet and LensNet of a lens run; -> what was taken.

        Raises:
            ValueError: there is none, or its parts have other architectures.
        """
        return take_parts(self, Path(path).expanduser())

    def prepare(self, datamodule) -> None:
        self.fit_data(datamodule, self.gistnet.block_size, self.hparams.horizon)

    check_lengths = staticmethod(check_windows)

    def session_parts(self):
        return {"gistnet": self.gistnet, "lensnet": self.lens}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.data = self.trainer.datamodule

    def set_dtype(self, dtype: torch.dtype) -> None:
        if self._reference:  # which is not Lightning's to move; the base learns, so it stays in fp32
            self._reference[0].to(self.trainer.strategy.root_device, dtype)
        else:
            super().set_dtype(dtype)
            for parameter in adapters_of(self.base).values():  # what learns stays in fp32
                parameter.data = parameter.data.float()

    def prefill(self, ids: Tensor) -> Prefill:
        """Documents ids [B, T]: what the base LM caches of them now, and the untouched one's hidden states."""
        with self.original() as original:
            first = prefill(original, ids, self.gistnet.needs_hidden)
        if not adapters_of(self.base) and not self._reference:
            return first
        now = prefill(self.base, ids, self.gistnet.needs_hidden)
        return Prefill(ids, first.hidden, now.cache, now.states)

    def document(self, ids: Tensor) -> Prefill:
        """A document ids [1, C] as far as GistNet needs it."""
        return prefill(self.base, ids, with_states=True) if self.gistnet.needs_hidden else unread(ids)

    def full(self, ids: Tensor, cursor: int) -> Tensor:
        """What the untouched base LM makes of ids [1, T + H] at cursor T, over the full context: hidden [H, D]."""
        with self.original() as original:
            return original(original.embed(ids[:, :-1]), None)[0, cursor - 1 :]

    def budget(self, cursor: int, text: int) -> int:
        """Entries of a window of a text, which have their shares in turn."""
        return int(self.hparams.budgets[text % len(self.hparams.budgets)] * cursor)

    def count_tokens(self, count: int | Tensor) -> None:
        """So many more were learned from."""
        self.tokens += count
        self._new_tokens += count
        self.log("train/tokens", self.tokens.double(), reduce_fx="max")

    def amounts(self, batch) -> dict:
        count, self._new_tokens = self._new_tokens, 0
        return {"tokens": count}

    def on_validation_epoch_start(self) -> None:
        self.held, self.found = self.data.held_documents(self.data.validation_windows), []

    def validation_step(self, indices: Tensor, batch_index: int) -> None:
        for index in indices.tolist():
            document = self.held[index % len(self.held)]
            ids, cursor = document["ids"].to(self.device)[None], document["cursor"]
            if index not in self._before:
                with self.original() as original:
                    hidden = original(original.embed(ids[:, :-1]), None)[0]
                    self._before[index] = nll(original, hidden, ids[0, 1:])
            plain = nll(self.base, self.base(self.base.embed(ids[:, :-1]), None)[0], ids[0, 1:])
            before = self._before[index]
            (tree,) = same_rows(self.gistnet, self.base, self.document(ids[:, :cursor]), 1)
            costs = []
            for share in self.hparams.budgets:
                context = focused(tree, int(share * cursor), self.lens, dict(self.hparams.allocator))
                costs.append(continuation_nll(self.base, context, ids[:, cursor:], self.attention).mean())
            row = (torch.stack(costs).mean(), before[cursor - 1 :].mean(), plain.mean(), before.mean())
            self.found.append(torch.stack(row))

    def on_validation_epoch_end(self) -> None:
        windows, full, plain, before = torch.stack(self.found).double().mean(0).unbind()
        self.log("val/cost", windows - full, prog_bar=True)
        self.log("val/nll", windows)
        self.log("val/base_lost", plain - before)  # nats that the base LM's own NLL lost

    def kept_of_base(self) -> set[str]:
        return set(self.base.state_dict() if self.train_base == "full" else adapters_of(self.base))

    def factor(self, step: int, group: dict) -> float:
        """A part's warm-up and cosine are over its own steps."""
        own, total = self.own_steps(step, group["part"])
        floor = floor_of(self.hparams.min_lr, group["lr"])
        return warmup_cosine(own, self.hparams.warmup, total, floor)

    def own_steps(self, step: int, part: str) -> tuple[int, int]:
        """-> (steps that a part had before this one, steps that it will have)."""
        return step, self.hparams.max_steps

    def groups(self) -> list[dict]:
        """What has no gradient in a step is left as it is, state and all: parts that take turns share one optimizer."""
        h, has_steps = self.hparams, {part: self.own_steps(0, part)[1] for part in self.parts}
        gist, direct = list(self.gistnet.parameters()), list(self.lens.direct.parameters())
        known = {id(p) for p in direct}
        matrices = [p for p in gist if p.ndim == 2] if h.muon_lr is not None and has_steps["gist"] else []
        others = {id(p) for p in matrices}
        groups = [
            {"part": "gist", "params": [p for p in gist if id(p) not in others], "lr": h.gist_lr},
            {"part": "lens", "params": [p for p in self.lens.parameters() if id(p) not in known], "lr": h.lens_lr},
            {"part": "lens", "params": direct, "lr": h.direct_lr},
            {"part": "lora", "params": self.base_parameters(), "lr": h.base_lr},
            {"part": "gist", "params": matrices, "lr": h.muon_lr, "muon": True},
        ]
        return [group | {"weight_decay": h.weight_decay} for group in groups if has_steps[group["part"]]]

    @torch.no_grad()
    def finish(self, folder: Path, datamodule) -> None:
        """What focus is worth now, what the base LM has lost, and the next command."""
        self.eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            report(self, folder, datamodule)
        command = shlex.join(["python", "-m", "megactx.stages.export", str(folder)])
        print(f"Next: {command} OUT (a plain Hugging Face folder with all parts)")
