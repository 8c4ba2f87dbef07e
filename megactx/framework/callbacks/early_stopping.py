"""When a stage ends before its last step, and what its validations warn of."""

import logging

from lightning.pytorch.callbacks import Callback

log = logging.getLogger(__name__)

EMA_CHECKS, PATIENCE, IMPROVEMENT, FEWEST = 10, 3, 0.05, 3
# logged value -> (healthy above, what to do)
COLLAPSE = {
    "val/diversity": (0.3, "the gists collapse"),
    "val/cosine_std": (0.1, "all pairs of gists are alike"),
}
WORST_RATIO = 2.0


class ValidationProtocol(Callback):
    """Ends a stage on a plateau, or when validation gets worse, and warns of collapse.

    After each validation the stage's ``monitor`` is compared with its exponential moving average over the last 10
    checks (alpha 2/11, updated afterwards): three checks in a row above it end the stage. So does a plateau: the best
    value improved by less than 5 % against the best one a window ago, counted from the end of the warm-up and over at
    least three validations.

    Args:
        window: steps of the plateau window.
        warmup: steps whose validations do not count.

    Raises:
        ValueError: a window below 1.
    """

    def __init__(self, window: int, warmup: int):
        if window < 1:
            raise ValueError(f"preset.plateau_window={window} is not allowed: it must be 1 or more steps")
        self.window, self.warmup = window, warmup
        self.steps, self.values, self.ema, self.worse = [], [], None, 0

    def state_dict(self) -> dict:
        return {"steps": self.steps, "values": self.values, "ema": self.ema, "worse": self.worse}

    def load_state_dict(self, state: dict) -> None:
        self.steps, self.values = list(state["steps"]), list(state["values"])
        self.ema, self.worse = state["ema"], state["worse"]

    def on_validation_end(self, trainer, pl_module) -> None:
        step, monitor = trainer.global_step, pl_module.monitor
        if trainer.sanity_checking or monitor not in trainer.callback_metrics:
            return
        self._warn(trainer, pl_module)
        if step <= self.warmup or step in self.steps:  # a run resumed at a validation repeats it
            return
        before = self.ema
        if reason := self.add(step, float(trainer.callback_metrics[monitor])):
            log.info("The stage ends at step %d: %s", step, reason)
            trainer.should_stop = True
        if before is not None:
            for logger in trainer.loggers:
                logger.log_metrics({f"{monitor}_ema": before}, step=step - 1)  # where its figures are

    def add(self, step: int, value: float) -> str:
        """One more validation; -> why the stage should end, or an empty string."""
        self.worse = self.worse + 1 if self.ema is not None and not value <= self.ema else 0
        self.ema = value if self.ema is None else self.ema + 2 / (EMA_CHECKS + 1) * (value - self.ema)
        self.steps.append(step)
        self.values.append(value)
        if self.worse >= PATIENCE:
            return f"{PATIENCE} validations in a row were worse than their moving average"
        earlier = [v for s, v in zip(self.steps, self.values, strict=True) if s <= step - self.window]
        if earlier and len(self.values) >= FEWEST:
            best, then = min(self.values), min(earlier)
            if then - best < IMPROVEMENT * abs(then):
                gained = f"less than {IMPROVEMENT:.0%} over {self.window} steps ({then:.3f} -> {best:.3f})"
                return f"the best validation improved by {gained}"
        return ""

    def _warn(self, trainer, pl_module) -> None:
        values = trainer.callback_metrics
        weight = pl_module.loss_settings("contrastive").get("weight")
        remedy = f"Raise contrastive.weight (lambda, now {weight}), or lower the learning rate"
        for name, (least, what) in COLLAPSE.items():
            if name in values and float(values[name]) < least:
                log.warning("%s = %.3f is below %g: %s. %s", name, float(values[name]), least, what, remedy)
        if "val/ppl_ratio" in values and float(values["val/ppl_ratio"]) > WORST_RATIO:
            log.warning("val/ppl_ratio = %.2f is above %g", float(values["val/ppl_ratio"]), WORST_RATIO)
