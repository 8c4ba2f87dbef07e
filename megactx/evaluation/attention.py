"""What a way of reading costs against full attention, on raw documents: NLL by token, paired over documents."""

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from megactx.lm import BaseLM
from megactx.lm.chunked_head import nll
from megactx.memory import MegaContextTree, WorkingContext
from megactx.memory.pyramid import Attention

from .bootstrap import mean_interval
from .table import Report, Table, cell, pivot

FULL = "full attention"
SPANS = ("settled", "live")
LEGEND = (
    "dNLL = NLL less that of the first row, nats per token; brackets: 95 %, bootstrap over documents. settled: rows"
    " that see the sink, gists of what is far and their own segment under mega; live: the newest rows, which see every"
    " token. Pairs: seen ones, as a share of those of full attention."
)

Reader = Callable[[WorkingContext], Tensor]  # -> hidden [1, T, D]


def raw(tree: MegaContextTree) -> WorkingContext:
    """All tokens of a tree's one row."""
    index = torch.arange(int(tree.lengths[0]), device=tree.device)[None]
    return WorkingContext(tree, torch.zeros_like(index), index, [index.shape[1]], index.shape[1])


class Costs:
    """Documents read in several ways.

    Args:
        base: whose head scores what is read.
        arms: name -> (how it reads, for the share of pairs; the reader); the first is what the others are compared
            with, the second what the paired table is about.
        mega: whose settled and live rows are told apart.
    """

    def __init__(self, base: BaseLM, arms: dict[str, tuple[Attention, Reader]], mega: Attention):
        self.base, self.arms, self.mega = base, arms, mega
        self.rows: list[tuple[int, dict[str, Tensor], Tensor]] = []  # document, NLL by arm [T - 1], live [T - 1]
        self.seconds, self.shares = dict.fromkeys(arms, 0.0), dict.fromkeys(arms, 0.0)

    @torch.no_grad()
    def measure(self, trees: Iterable[MegaContextTree]) -> Iterator["Costs"]:
        """Read documents; -> itself after each."""
        for tree in trees:
            context, found = raw(tree), {}
            ids = tree.tokens[0].long()
            for name, (attention, reader) in self.arms.items():
                begin = time.perf_counter()
                hidden = reader(context)[0, :-1]
                self.seconds[name] += time.perf_counter() - begin
                self.shares[name] += attention.pairs(context).item()
                found[name] = nll(self.base, hidden, ids[1:]).cpu()
            pyramid = self.mega.pyramid(context)
            live = pyramid.mask.is_live.gather(1, pyramid.leaves)[0, :-1].cpu()
            self.rows.append((len(self.rows), found, live))
            yield self

    def table(self) -> Table:
        """As the long table."""
        table, count = Table(), len(self.rows)
        first, *rest = self.arms
        for span in SPANS:
            kept = [(number, found, live if span == "live" else ~live) for number, found, live in self.rows]
            owner = torch.cat([torch.full((int(mask.sum()),), number) for number, _, mask in kept])
            if not len(owner):
                continue
            values = {name: torch.cat([found[name][mask] for _, found, mask in kept]) for name in self.arms}
            for name in self.arms:
                about = {"carrier": name, "span": span, "n": count}
                table.add("nll", values[name].mean().item(), **about)
                table.add("dnll", mean_interval(owner, values[name] - values[first]), **about)
                if name in rest[1:]:
                    table.add("behind", mean_interval(owner, values[rest[0]] - values[name]), **about)
        for name in self.arms:
            table.add("seconds", self.seconds[name] / count, carrier=name)
            table.add("pairs", self.shares[name] / count, carrier=name)
        return table

    def report(self, title: str, about: dict) -> Report:
        """As tables."""
        table, names = self.table(), list(self.arms)
        tokens = len(self.rows[0][2]) + 1
        columns = [(f"NLL, {span}", {"metric": "nll", "span": span}, ".3f") for span in SPANS]
        columns += [(f"dNLL, {span}", {"metric": "dnll", "span": span}, _signed) for span in SPANS]
        columns += [("pairs", {"metric": "pairs"}, ".0%"), ("seconds", {"metric": "seconds"}, ".2f")]
        counted = f"{len(self.rows)} documents of {tokens:,} tokens"
        sheets = [pivot(counted, table, columns, heading="read with", strong=names[1:2])]
        if names[2:]:
            paired = [(span, {"metric": "behind", "span": span}, _signed) for span in SPANS]
            heading = f"NLL of {names[1]} less that of"
            sheets.append(pivot("paired over documents", table, paired, heading=heading, order=names[2:]))
        return Report(title, table, sheets, LEGEND, about=about)


def _signed(row: dict) -> str:
    return cell(row, "+.3f") if row else ""
