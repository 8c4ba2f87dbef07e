"""What a run says of itself: which parts train, at which learning rates, with which gradients.

These callbacks watch. They draw no random numbers and change nothing, so a run ends at the same weights without them.
"""

import logging

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

log = logging.getLogger(__name__)


def parts(stage: nn.Module) -> dict[str, nn.Module]:
    """name -> module of the parts of a stage that have parameters; those of a ``ModuleDict`` are parts of their own."""
    found = {}
    for name, child in stage.named_children():
        found.update(child.named_children() if isinstance(child, nn.ModuleDict) else {name: child})
    return {name: part for name, part in found.items() if any(True for _ in part.parameters())}


def due(trainer) -> bool:
    """Whether the optimizer step that is about to be taken is one that the loggers see; with 0 there is none."""
    return trainer.log_every_n_steps > 0 and (trainer.global_step + 1) % trainer.log_every_n_steps == 0


class Summary(Callback):
    """Says once, before training, what trains, what is frozen, and how many parameters that is."""

    def setup(self, trainer, pl_module, stage: str) -> None:  # before a strategy wraps or shards anything
        if stage == "fit" and trainer.is_global_zero:
            log.info("%s", describe(pl_module))


def describe(stage: nn.Module) -> str:
    """``Parameters that train: gistnet 1,315,000; frozen: base 5,500,000``."""
    trained, frozen = [], []
    for name, part in parts(stage).items():
        count = sum(p.numel() for p in part.parameters())
        learning = sum(p.numel() for p in part.parameters() if p.requires_grad)
        if 0 < learning < count:
            trained.append(f"{name} {learning:,} of its {count:,}")
        else:
            (trained if learning else frozen).append(f"{name} {count:,}")
    return f"Parameters that train: {', '.join(trained) or 'none'}; frozen: {', '.join(frozen) or 'none'}"


class LearningRate(Callback):
    """``lr/adamw``, ``lr/muon``: the learning rate of every optimizer that a step uses, at the steps that are logged.

    Lightning's ``LearningRateMonitor`` needs a logger, and writes a row for every batch of an accumulated step.
    """

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if due(trainer):
            for part in getattr(optimizer, "parts", (optimizer,)):  # several in one, as MuonWithAdamW is
                for number, group in enumerate(part.param_groups, start=1):
                    suffix = f"_{number}" if number > 1 else ""
                    pl_module.log(f"lr/{type(part).__name__.lower()}{suffix}", group["lr"])


class GradientNorm(Callback):
    """``grad_norm/NAME`` for every part that trains: the 2-norm of its gradient before clipping, on this process."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if due(trainer):
            for name, part in parts(pl_module).items():
                if grads := [p.grad for p in part.parameters() if p.grad is not None]:
                    pl_module.log(f"grad_norm/{name}", torch.nn.utils.get_total_norm(grads))
