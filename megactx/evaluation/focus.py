"""What focus is worth: windows of one budget by LensNet and by simple rules, judged by what comes next (method 10).

    NLL_H(window) = mean_{h<H} -log P(x[T + h] | window, x[T .. T + h))

The rules all get the same tree, the same budget and the same raw newest tokens. ``oracle`` refocuses by measured
values, which look at the very tokens that are scored: no rule can have them, and the distance to it is the regret.

B rows, T tokens before the cursor, H scored tokens, N blocks.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megactx.focus import moves
from megactx.focus.allocator import FocusAllocator
from megactx.focus.edit_labels import continuation_nll, measure_values
from megactx.focus.layout import by_value, free_edits
from megactx.focus.lensnet import LensNet
from megactx.focus.price import price, signed_scores
from megactx.lm import BaseLM
from megactx.lm.chunked_head import nll
from megactx.memory import MegaContextTree, WorkingContext
from megactx.memory.pyramid import PLAIN, Attention

from .policies.gists import Gists
from .policies.random_blocks import RandomBlocks
from .policies.surprise import Surprise
from .policy import Seen, values_of

LENS, ORACLE, FULL, DROP = "LensNet", "greedy oracle", "full context", "newest tokens alone"
RECENCY, RANDOM, SURPRISE, GISTS = "recency", RandomBlocks.title, Surprise.title, Gists.title
REFOCUSES, ORACLE_REFOCUSES = 16, 3  # at most


@dataclass
class FocusScores:
    """NLL of what follows [documents], per budget and policy, and what LensNet and the allocator did."""

    document: list[int] = field(default_factory=list)
    domain: list[str] = field(default_factory=list)
    nll: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # budget -> policy -> per document
    free: dict[str, list[int]] = field(default_factory=dict)  # budget -> blocks that can be opened
    telemetry: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # budget -> figure -> per refocus
    estimated: list[Tensor] = field(default_factory=list)  # of edits that the oracle measured, at its first look
    measured: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def measure_focus(
    base: BaseLM,
    encoder,
    lens: LensNet,
    allocator: dict,
    documents: Iterable[dict],
    budgets: list[float],
    oracle: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
    attention: Attention = PLAIN,
) -> FocusScores:
    """Judge every policy at every budget on the same documents.

    Args:
        encoder: the GistNet that trees are made with.
        allocator: keyword arguments of ``FocusAllocator``.
        documents: dicts ``ids`` [T + H], ``cursor`` T, ``domain``, ``text``.
        budgets: entries of a window over T.
        oracle: documents, the first ones, on which the oracle is measured too; it is slow.
        attention: how windows are read.
    """
    out = FocusScores()
    walk = histories(base, encoder, progress(list(documents)))
    for number, (document, after, tree, full, values) in enumerate(walk):
        cursor = document["cursor"]
        out.document.append(document["text"])
        out.domain.append(document["domain"])
        for share in budgets:
            name, budget = f"{share:g}", int(share * cursor)
            row = out.nll.setdefault(name, {})
            for policy, context in windows(tree, budget, values).items():
                row.setdefault(policy, []).append(continuation_nll(base, context, after, attention).mean().item())
            context = focused(tree, budget, lens, allocator, out.telemetry.setdefault(name, {}))
            row.setdefault(LENS, []).append(continuation_nll(base, context, after, attention).mean().item())
            row.setdefault(FULL, []).append(full[cursor - 1 :].mean().item())
            row.setdefault(DROP, []).append(newest(base, document, budget))
            if number < oracle:
                row.setdefault(ORACLE, []).append(
                    greedy_oracle(base, tree, budget, lens, allocator, after, out, attention)
                )
            out.free.setdefault(name, []).append(int(free_edits(tree, budget)[0]))
    return out


def histories(base: BaseLM, encoder, documents: Iterable[dict]) -> Iterator[tuple]:
    """Of each document: itself, its ids behind the cursor [1, H], the tree of those before, the NLL of all tokens but
    the first over the full context [T + H - 1], and title -> values [1, N] of every policy of ``policies``."""
    for number, document in enumerate(documents):
        ids, cursor = document["ids"].to(base.model.device)[None], document["cursor"]
        tree = MegaContextTree.from_tokens(ids[:, :cursor], encoder, base)
        full = plain_nll(base, ids)
        seen = Seen(base, tree, ids[:, :cursor], full[: cursor - 1], number)
        yield document, ids[:, cursor:], tree, full, values_of(seen)


def windows(tree: MegaContextTree, budget: int, values: dict[str, Tensor]) -> dict[str, WorkingContext]:
    """The window of each policy but LensNet."""
    out = {RECENCY: WorkingContext.recency(tree, budget)}
    return out | {name: by_value(tree, budget, value) for name, value in values.items()}


def focused(tree, budget: int, lens: LensNet, allocator: dict, telemetry: dict | None = None) -> WorkingContext:
    """The cold start, refocused by LensNet and the allocator until they rest."""
    context, allocator, still = WorkingContext.recency(tree, budget), FocusAllocator(**allocator), 0
    for _ in range(REFOCUSES):
        scores = lens.score(context, moves(context, allocator.protected), allocator.margin(lens.tau))
        edits = allocator.refocus(context, scores.score, scores.price)
        if telemetry is not None:
            told = allocator.telemetry
            for name in ("swap_rate", "utilisation", "residency", "expands", "collapses", "price"):
                telemetry.setdefault(name, []).append(float(getattr(told, name)[0]))
        still = 0 if len(edits) else still + 1
        if still > allocator.cooldown:  # an edit may still wait for its turn
            break
    return context


def newest(base: BaseLM, document: dict, budget: int) -> float:
    """NLL of what follows with the newest ``budget`` raw tokens and nothing of what was before."""
    ids = document["ids"][document["cursor"] - budget :].to(base.model.device)[None]
    return plain_nll(base, ids)[budget - 1 :].mean().item()


def plain_nll(base: BaseLM, ids: Tensor) -> Tensor:
    """NLL of ids [1, T] from the second on over the full context, [T - 1] nats."""
    return nll(base, base(base.embed(ids[:, :-1]), None)[0], ids[0, 1:])


def greedy_oracle(base, tree, budget, lens, allocator, after, out: FocusScores, attention: Attention = PLAIN) -> float:
    """Edits by their measured values, which look at the tokens that are scored: no policy can have them.

    Setting: ``stage.evaluate.oracle``. The refocuses are greedy; the best NLL on the way counts.
    """
    context = WorkingContext.recency(tree, budget)
    greedy = FocusAllocator(**allocator | {"temperature": 0.0, "max_edits": 10**6, "cooldown": 0})
    best = float("inf")
    for turn in range(ORACLE_REFOCUSES + 1):
        legal = moves(context, greedy.protected)
        edits = legal.edits(context) if turn < ORACLE_REFOCUSES else legal.edits(context)[:0]
        values, plain = measure_values(base, context, edits, after, attention)
        best = min(best, plain.item())
        if not len(edits):
            break
        if not turn:
            out.estimated.append(_estimates(lens, context, legal))
            out.measured.append(values.cpu())
        table = torch.zeros(2, *context.lod.shape, device=values.device)
        for kind, where in enumerate((legal.expand, legal.leads)):
            table[kind][where] = values[edits.expand == (kind == 0)]
        table[1] = table[1].gather(1, legal.first.clamp(min=0)) * (legal.first >= 0)
        tau = values.std().clamp(min=1e-4)
        now = price(*table, legal, budget - context.lengths, tree.block_size, greedy.margin(tau))
        if not len(greedy.refocus(context, signed_scores(*table, legal, now, tau), now)):
            break
    return best


def _estimates(lens: LensNet, context: WorkingContext, legal) -> Tensor:
    """What LensNet says of all legal edits, in the order of ``Moves.edits``."""
    from megactx.focus.lensnet import masked

    v_down, v_keep = masked(lens.read(context), legal)
    return torch.cat([v_down[legal.expand], v_keep[legal.leads]]).cpu()
