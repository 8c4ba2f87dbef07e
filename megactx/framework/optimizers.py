"""Optimizers and schedules of the stages."""

import math

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, ``torch.optim.Muon``) for matrices, AdamW for embeddings and vectors, as one optimizer.

    One object, so that Lightning's automatic optimisation, clipping, schedules and checkpoints work unchanged.

    Args:
        matrices: 2-D parameters of hidden layers.
        others: embeddings, heads, norms, biases.
    """

    def __init__(self, matrices, others, muon_lr: float, adamw_lr: float, weight_decay: float, betas=(0.9, 0.95)):
        self.muon = torch.optim.Muon(list(matrices), lr=muon_lr, weight_decay=weight_decay)
        self.adamw = torch.optim.AdamW(list(others), lr=adamw_lr, weight_decay=0.0, betas=betas)
        self.parts = (self.muon, self.adamw)
        super().__init__([p for part in self.parts for group in part.param_groups for p in group["params"]], {})

    @property
    def param_groups(self):
        # The parts' own groups, so that a schedule's writes reach them even after a checkpoint replaced them.
        return [group for part in self.parts for group in part.param_groups]

    @param_groups.setter
    def param_groups(self, value):
        pass  # the base class assigns it; the parts hold the truth

    def add_param_group(self, group):
        pass  # likewise: the base class hands over what the parts already have

    @property
    def state(self):
        return {**self.muon.state, **self.adamw.state}

    @state.setter
    def state(self, value):
        pass

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self):
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state):
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def warmup_stable_decay(step: int, warmup: int, total: int, decay: float) -> float:
    """Factor of the peak learning rate: linear warm-up, flat, linear decay to 0 over the last ``decay`` share.

    Hu et al. 2024 (arXiv 2404.06395): any checkpoint of the flat part can be continued or decayed.
    """
    if step < warmup:
        return (step + 1) / warmup
    start = total * (1 - decay)
    return 1.0 if step < start else max(0.0, (total - step) / max(1.0, total - start))


def warmup_cosine(step: int, warmup: int, total: int, floor: float) -> float:
    """Factor of the peak learning rate: linear warm-up, then a cosine down to ``floor`` at ``total`` (method 4)."""
    if step < warmup:
        return (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))
