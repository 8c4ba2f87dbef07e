"""What the base LM is shown of a history, and what the next tokens then cost: one function for each policy.

    full context   everything, while it fits           (megacontext=none: the stock model)
    dropping       [ sink ][ newest W - K tokens ]     (Xiao et al. 2023: the sink keeps attention in order)
    recency        [ sink ][ gists, coarser the older ][ newest tokens ]
    focus          the same budget, detail where LensNet wants it
    earned         the sink, the newest tokens, what comes again, and what LensNet's estimate puts above them
    keys           the same, and before it blocks that the newest tokens find by their keys, without a chat template
    ..., recall    the same, and what is shown or remembered tells what stood behind the end of the text before

Every policy is at the same place at the same time: what it shows is chosen anew every K scored tokens, within W
entries, and up to K - 1 tokens that came since are read behind them.

T tokens of a history, S scored tokens, W entries, K of a block.
"""

import time
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from torch import Tensor

from megactx.lm import BaseLM, masks
from megactx.lm.chunked_head import nll
from megactx.memory import MegaContextTree, WorkingContext
from megactx.runtime import Controller, Models, Refocused, Settings
from megactx.runtime.recall import mixed_nll

FULL, DROP, RECENCY, FOCUS, EARNED, KEYS = "full context", "dropping", "recency", "focus", "earned", "keys"
RECALLS = {policy: f"{policy}, recall" for policy in (FULL, DROP, EARNED)}
ROWS = 4  # windows of dropping that are read at once


@dataclass(frozen=True)
class Found:
    """What a policy gave."""

    nll: Tensor  # [S] nats
    seconds: float  # for all of S, choosing what is shown included; of CPU time where there is no GPU
    context: WorkingContext | None = None  # as it was when S began; None: there is none
    telemetry: dict[str, float] = field(default_factory=dict)  # means over the refocuses while S was read


def clock(device: torch.device) -> float:
    """CPU time of this process, or the time when a GPU is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def full_context(models: Models, ids: Tensor, scored: Tensor) -> Found:
    """The plain model reads all of ids [T], and scored [S] by blocks.

    Raises:
        ValueError: more tokens than the base takes.
    """
    device = models.base.model.device
    stream = Controller(models, Settings(megacontext="none")).stream()
    stream.append(ids[None])
    began = clock(device)
    parts = [stream.append(part[None], score=True)[0] for part in scored.split(models.gistnet.block_size)]
    return Found(torch.cat(parts).float(), clock(device) - began)


@torch.no_grad()
def dropping(base: BaseLM, ids: Tensor, scored: Tensor, budget: int, block: int, positions: str) -> Found:
    """The sink and the newest tokens, W entries in all, chosen anew every K tokens; what was before is gone.

    Args:
        positions: ``absolute``: the newest tokens keep their own; ``rebased``: they follow on the sink's.
    """
    device, new = base.model.device, budget - block
    count = -(-len(scored) // block)
    padding = scored[-1:].expand(count * block - len(scored))  # scored too, and then forgotten
    ids = torch.cat([ids, scored, padding]).to(device)
    length = len(ids) - count * block
    began, out = clock(device), []
    for first in torch.arange(count, device=device).split(ROWS):
        start = length + first[:, None] * block - new  # [B, 1], of the newest tokens
        sink = torch.arange(block, device=device).expand(len(first), -1)
        place = torch.cat([sink, start + torch.arange(new + block, device=device)], dim=1)  # [B, W + K]
        tokens = ids[place]
        at = place if positions == "absolute" else torch.arange(budget + block, device=device).expand_as(place)
        hidden = base(base.embed(tokens[:, :-1]), at[:, :-1], masks.CAUSAL)[:, budget - 1 :]
        out.append(nll(base, hidden.flatten(0, 1), tokens[:, budget:].flatten()))
    return Found(torch.cat(out)[: len(scored)].cpu(), clock(device) - began)


def session(
    models: Models,
    tree: MegaContextTree,
    scored: Tensor,
    kind: str,
    budget: int,
    positions: str,
    limit: int,
    more: int,
    keys: int = 0,
) -> Found:
    """A session that has taken up a history and now reads scored [S].

    Args:
        tree: of the history; it is not changed.
        kind: ``recency``, ``focus``, ``earned`` or ``keys``.
        positions: ``absolute`` or ``rebased``, the latter below ``limit``.
        more: refocuses at the cold start, behind those that a session makes.
        keys: blocks, at most, that are found by them.
    """
    device, events = models.base.model.device, []
    earn, keys = kind in (EARNED, KEYS), keys if kind == KEYS else 0
    limit = limit if positions == "rebased" else None
    settings = Settings(budget, FOCUS if earn else kind, positions, limit, earn=earn, keys=keys)
    stream = Controller(models, settings).stream(tree=tree.slice(0), observers=[events.append])
    context = stream.window()
    for _ in range(more):
        stream.focus.refocus(context)
    before = stream.focus.shown(context.copy(), stream.questions())[0]
    stream.logits()
    began = clock(device)
    found = stream.append(scored[None], score=True)[0]
    seconds, events = clock(device) - began, [event for event in events if event.read is not None]
    return Found(found, seconds, before, telemetry(events))


def recalled(found: Found, ids: Tensor, scored: Tensor, within: int | None = None) -> Found:
    """The same policy where what came before tells, too: as a session with ``recall`` says, for it changes no window.

    Args:
        ids: of the history, [T].
        within: newest tokens that tell; ``None``: all that a session remembers. Dropping has no more than its window.
    """
    began, how = time.process_time(), {} if within is None else {"within": within}
    nll = mixed_nll(found.nll, torch.cat([ids, scored]).to("cpu", torch.int32), **how)
    return replace(found, nll=nll, seconds=found.seconds + time.process_time() - began)


def telemetry(events: list[Refocused]) -> dict[str, float]:
    """Means over refocuses; ``rooms``: share of them before which siblings were collapsed to make room."""
    told = [event.telemetry for event in events if event.telemetry is not None]
    lists = {
        "swap_rate": [float(t.swap_rate[0]) for t in told],
        "residency": [value for t in told if (value := float(t.residency[0])) == value],  # NaN: there was no edit
        "utilisation": [event.utilisation[0] for event in events],
        "earned": [float(event.earned[0]) for event in events if event.earned is not None],
        "reuse": [event.reuse for event in events if event.reuse is not None],
        "rooms": [float(event.room is not None or bool(event.started.any())) for event in events],
    }
    return {name: fmean(values) for name, values in lists.items() if values}
