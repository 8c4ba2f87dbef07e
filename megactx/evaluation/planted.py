"""Is the block that is needed in detail? Of every policy, on documents with a planted fact (``megactx.data.planted``).

Only cases that the base LM can use count: with the needed block opened among gists, its NLL of the answer falls by at
least ``USABLE`` nats per token.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from megactx.focus.edit_labels import continuation_nll
from megactx.focus.layout import by_value
from megactx.focus.lensnet import LensNet
from megactx.lm import BaseLM
from megactx.memory import WorkingContext
from megactx.memory.pyramid import PLAIN, Attention

from .focus import FULL, GISTS, LENS, focused, histories, windows
from .table import OVERALL

NEEDED = "the needed block"  # opened among gists
USABLE = 0.5  # nats per token


@dataclass
class PlantedScores:
    """One entry per case in each list."""

    kind: list[str] = field(default_factory=list)
    nll: dict[str, list[float]] = field(default_factory=dict)  # policy -> nats per token of the answer
    found: dict[str, list[bool]] = field(default_factory=dict)  # policy -> the needed block is raw

    def usable(self) -> torch.Tensor:
        """Cases that the base LM can use, bool [cases]."""
        return torch.tensor(self.nll[GISTS]) - torch.tensor(self.nll[NEEDED]) >= USABLE


@torch.no_grad()
def measure_planted(
    base: BaseLM,
    encoder,
    lens: LensNet,
    allocator: dict,
    documents: Iterable[dict],
    budget: float,
    progress: Callable[[Iterable], Iterable] = iter,
    attention: Attention = PLAIN,
) -> PlantedScores:
    """Every policy at one budget on the same cases.

    Args:
        encoder, lens, allocator, attention: as for ``measure_focus``.
        documents: of ``plant``.
        budget: entries of a window over T.
    """
    out = PlantedScores()
    for document, after, tree, full, values in histories(base, encoder, progress(list(documents))):
        entries = int(budget * document["cursor"])
        opened = torch.full_like(values[GISTS], -torch.inf)
        opened[0, document["needed"]] = 1.0
        found = windows(tree, entries, values) | {NEEDED: by_value(tree, entries, opened)}
        found[LENS] = focused(tree, entries, lens, allocator)
        out.kind.append(document["kind"])
        for policy, context in found.items():
            out.nll.setdefault(policy, []).append(continuation_nll(base, context, after, attention).mean().item())
            out.found.setdefault(policy, []).append(in_detail(context, document["needed"]))
        out.nll.setdefault(FULL, []).append(full[document["cursor"] - 1 :].mean().item())
    return out


def in_detail(context: WorkingContext, needed: list[int], row: int = 0) -> bool:
    """Whether all of these blocks of level 1 stand as raw tokens."""
    lod, index = (t[row, : int(context.counts[row])] for t in (context.lod, context.index))
    raw = set((index[lod == 0] // context.tree.block_size).tolist())
    return set(needed) <= raw


def summarise_planted(scores: PlantedScores) -> dict:
    """Per kind and overall: cases, usable ones, and of these each policy's share in detail and NLL of the answer."""
    usable, out = scores.usable(), {"kinds": {}}
    for kind in (OVERALL, *dict.fromkeys(scores.kind)):
        own = torch.tensor([kind in (OVERALL, one) for one in scores.kind])
        chosen = own & usable
        rows = {}
        for policy, values in scores.nll.items():
            mean = float(torch.tensor(values)[chosen].mean()) if chosen.any() else float("nan")
            rows[policy] = {"nll": mean, "found": None}
            if policy in scores.found and chosen.any():
                rows[policy]["found"] = float(torch.tensor(scores.found[policy])[chosen].double().mean())
        out["kinds"][kind] = {"cases": int(own.sum()), "usable": int(chosen.sum()), "rows": rows}
    return out
