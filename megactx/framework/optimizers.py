"""The optimizer of every stage, and the schedules."""

import math
from collections import defaultdict

import torch
from torch import Tensor

from .run.device import cpu_bf16_units


def fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies matrices in it, else fp32: other CPUs emulate it, 20 times slower."""
    return torch.float32 if device.type == "cpu" and not cpu_bf16_units() else torch.bfloat16


def newton_schulz(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The nearest matrices with singular values near 1, by Newton-Schulz steps (Jordan et al. 2024).

    Args:
        matrices: [N, A, B], in the precision in which the products are made. A <= B is the cheaper way round.
        coefficients: a, b, c of the step ``a X + (b X X^T + c (X X^T)^2) X``.
        eps: least norm that a matrix is divided by.
    """
    a, b, c = coefficients
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT  # [N, A, A]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Muon):
    """``torch.optim.Muon`` in the precision that the device is good at, all matrices of a shape at once.

    Torch's own step makes each matrix alone and always in bf16: 15.5 of the 18.9 seconds of a training step on a CPU
    without bf16 units.
    """

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights, grads, momenta = [], [], []
            self._init_group(group, weights, grads, momenta)
            alike = defaultdict(list)  # matrices and their transposes have the same products
            for weight, grad, momentum in zip(weights, grads, momenta, strict=True):
                momentum.lerp_(grad, 1 - group["momentum"])
                update = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                tall = weight.shape[0] > weight.shape[1]
                alike[update.mT.shape if tall else update.shape].append((weight, update.mT if tall else update, tall))
            for members in alike.values():
                updates = torch.stack([update for _, update, _ in members]).to(fast_dtype(members[0][0].device))
                updates = newton_schulz(updates, group["ns_coefficients"], group["ns_steps"], group["eps"])
                for (weight, _, tall), update in zip(members, updates.to(members[0][0].dtype), strict=True):
                    rows, columns = weight.shape
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    scale = math.sqrt(max(1, rows / columns))  # torch's default, adjust_lr_fn="original"
                    weight.add_(update.mT if tall else update, alpha=-group["lr"] * scale)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the groups that ask for it, AdamW for the others, as one optimizer: every stage has this one.

    One object, so that Lightning's automatic optimisation, clipping, schedules and checkpoints work unchanged. Nothing
    of a group depends on which other groups there are.

    Args:
        groups: dicts with ``params``, ``lr`` and ``weight_decay``; ``muon: True`` where Muon has them (matrices of
            hidden layers); whatever else a stage keeps in them. Groups without parameters are left out.
        betas: of AdamW.

    Raises:
        ValueError: nothing to train, or a group of Muon's with something that is no matrix.
    """

    def __init__(self, groups: list[dict], betas: tuple[float, float] = (0.9, 0.999)):
        groups = [{**group, "params": list(group["params"])} for group in groups]
        groups = [group for group in groups if group["params"]]
        for group in groups:
            assert {"lr", "weight_decay"} <= group.keys(), "the rate and the decay of every group are said"
        muon = [group for group in groups if group.get("muon")]
        adamw = [group for group in groups if not group.get("muon")]
        self.parts = ([Muon(muon)] if muon else []) + ([torch.optim.AdamW(adamw, betas=betas)] if adamw else [])
        super().__init__([p for group in groups for p in group["params"]], {})

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
        return {parameter: state for part in self.parts for parameter, state in part.state.items()}

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
        return {type(part).__name__.lower(): part.state_dict() for part in self.parts}

    def load_state_dict(self, state):
        for part in self.parts:
            part.load_state_dict(state[type(part).__name__.lower()])


def warmup_stable_decay(step: int, warmup: int, total: int, decay: float) -> float:
    """Factor of the peak learning rate: linear warm-up, flat, linear decay to 0 over the last ``decay`` share.

    Hu et al. 2024 (arXiv 2404.06395): any checkpoint of the flat part can be continued or decayed.
    """
    if step < warmup:
        return (step + 1) / warmup
    start = total * (1 - decay)
    return 1.0 if step < start else max(0.0, (total - step) / max(1.0, total - start))


def floor_of(min_lr: float, lr: float) -> float:
    """The end of a schedule as a factor of its peak ``lr``, which may be 0 or below it."""
    return min(1.0, min_lr / lr) if lr else 1.0


def warmup_cosine(step: int, warmup: int, total: int, floor: float) -> float:
    """Factor of the peak learning rate: linear warm-up, then a cosine down to ``floor`` at ``total`` (method 4)."""
    if step < warmup:
        return (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))
