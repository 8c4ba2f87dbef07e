"""``callbacks=sessions``: what a session of the parts as they are now is like, at every validation.

    held-out texts, one after another     [ appended ............................ ][ scored, a block at a time ]
                                                                                    one refocus for each block

``session/NAME`` is the mean over these refocuses of what ``runtime.telemetry`` measures of any session, so a run and
the sessions that come of it are watched by the same names; ``session/nll`` is that of the scored tokens. Nothing is
drawn at random and nothing is changed: a run ends at the same weights without it.
"""

from collections import defaultdict

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from megactx.gist import GistNet
from megactx.runtime import Controller, Models, Refocused, Settings
from megactx.runtime.metrics import BINS, bins, measured, rope_scales

SCORES, EDITS, KEPT = "megactx.lens.scores", "megactx.edits", "megactx.kv.entries"
ONCE = {"megactx.tokens", "megactx.refocuses", "megactx.history.size"}  # the same at each validation


class Sessions(Callback):
    """Plays one session per validation, of any stage that has a GistNet; without a LensNet its window is by recency.

    Args:
        budget: entries of the window.
        history: tokens that are appended, at most.
        scored: tokens behind them that are read as they would be decoded.

    Raises:
        ValueError: at the start of training: a stage without a GistNet, a budget that does not fit the models, or fewer
            held-out tokens than a window and what is scored.
    """

    def __init__(self, budget: int, history: int, scored: int):
        self.budget, self.history, self.scored = budget, history, scored
        for name, value in (("history", history), ("scored", scored)):
            if value < 1:
                raise ValueError(f"callbacks.sessions.{name}={value} is not allowed: at least 1 token")

    def on_fit_start(self, trainer, pl_module) -> None:
        self.controller = self._controller(pl_module)
        parts = [torch.as_tensor(document["input_ids"]) for document in trainer.datamodule.held]
        self.ids = torch.cat(parts)[: self.history + self.scored].long()
        if len(self.ids) <= self.budget + self.scored:
            raise ValueError(
                f"callbacks.sessions.budget={self.budget}: with {self.scored} scored tokens a session needs more than"
                f" {self.budget + self.scored} tokens, the held-out texts and callbacks.sessions.history give"
                f" {len(self.ids)}"
            )

    def _controller(self, stage) -> Controller:
        parts = stage.session_parts()
        if not isinstance(parts.get("gistnet"), GistNet):
            raise ValueError("callbacks=sessions: a session needs a GistNet, this stage has none")
        focus = parts.get("lensnet") is not None
        settings = {"allocator": dict(stage.hparams.allocator)} if focus else {"megacontext": "recency"}
        try:
            return Controller(Models(stage.base, **parts), Settings(self.budget, **settings))
        except ValueError as error:
            raise ValueError(f"callbacks.sessions: {error}") from error

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        if trainer.sanity_checking:
            return
        found, scores = self.play()
        for name, value in found.items():
            pl_module.log(f"session/{name}", value)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and sum(scores):
                import wandb

                edges = [-1 + 2 * place / BINS for place in range(BINS + 1)]
                histogram = wandb.Histogram(np_histogram=(scores, edges))
                logger.log_metrics({"session/score_histogram": histogram}, step=trainer.global_step)

    @torch.no_grad()
    def play(self) -> tuple[dict[str, float], list[int]]:
        """One session; -> (name -> value, entries by score in ``bins``)."""
        events: list[Refocused] = []
        stream = self.controller.stream(observers=[events.append])
        stream.append(self.ids[None, : -self.scored])
        stream.window()
        events.clear()
        nll = stream.append(self.ids[None, -self.scored :], score=True)
        found, scores = summary(events)
        found |= {_name(value.name, value.attribute): value.value for value in rope_scales(self.controller.models)}
        return found | {"nll": float(nll.mean())}, scores


def summary(events: list[Refocused]) -> tuple[dict[str, float], list[int]]:
    """Means over refocuses; -> (name -> value, entries by score in ``bins``).

    Edits are those of a refocus; scores are shares of all scored entries; of keys and values there is ``kv.reuse``, the
    share that was kept.
    """
    values = defaultdict(list)
    for event in events:
        for value in measured(event):
            values[value.name, value.attribute].append(value.value)
    scores = [sum(values.pop((SCORES, name), ())) for name in bins()]
    kept, computed = (sum(values.pop((KEPT, state), ())) for state in ("kept", "computed"))
    out = {}
    for (name, attribute), found in values.items():
        if name not in ONCE:
            out[_name(name, attribute)] = sum(found) / (len(events) if name == EDITS else len(found))
    if kept + computed:
        out["kv.reuse"] = kept / (kept + computed)
    if sum(scores):
        out |= {_name(SCORES, name): count / sum(scores) for name, count in zip(bins(), scores, strict=True)}
    return out, scores


def _name(name: str, attribute: str | None) -> str:
    return name.removeprefix("megactx.") + ("" if attribute is None else f".{attribute}")
