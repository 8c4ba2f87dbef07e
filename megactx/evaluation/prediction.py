"""Whether the next gist is foretold: its rank among others, beside the controls, paired over texts.

The candidates of a text are all its own gists but the one in question; they are filled up to ``AMONG`` from texts of
the same domain, at level 2 from texts of any.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.lm import BaseLM
from megactx.lm.chunked_head import nll
from megactx.lm.prefill import blocks, prefill, rows_at
from megactx.memory.encoding import Encoder
from megactx.memory.prediction import AMONG, CONTROL, Example, Readout, example_of, ranks

from .bootstrap import mean_interval
from .table import OVERALL, Report, Table, cell, pivot

READOUT, NEWEST, MEAN = "readout", "newest gist again", "mean gist"
CONTROLS = (NEWEST, MEAN, CONTROL)
NOTHING, TRUE = "no entry", "its own gist"
LEGEND = (
    f"Rank of the true next gist among {AMONG} by cosine: the other gists of the text, filled up from other texts."
    " top-1: share of ranks of 1; MRR: mean of 1 / rank; brackets: 95 %, bootstrap over texts. lead: MRR of the readout"
    " less that of the control."
)


@dataclass(frozen=True)
class Text:
    """A text that was read: its states and gists, and its domain."""

    example: Example
    domain: str


@torch.no_grad()
def measure(readout: Readout, texts: list[Text], seed: int = 0) -> Table:
    """The table of ranks, per level and domain."""
    table, draw = Table(), torch.Generator().manual_seed(seed)
    for lod in range(1, readout.levels + 1):
        found = {name: [] for name in (READOUT, *CONTROLS)}
        owner, domains, among = [], [], []
        for number, text in enumerate(texts):
            states, gists = text.example.of(lod)
            if len(gists) < 2:
                continue
            others = _others(texts, number, lod, AMONG - len(gists), draw)
            by_readout, by_map = readout.both(text.example, lod)
            shown = {READOUT: by_readout, NEWEST: gists[:-1], MEAN: readout.total[lod - 1].expand(len(gists) - 1, -1)}
            for name, predicted in (shown | {CONTROL: by_map}).items():
                found[name].append(ranks(predicted, gists, others))
            owner.append(torch.full((len(gists) - 1,), number))
            domains += [text.domain] * (len(gists) - 1)
            among.append(len(gists) + len(others))
        if owner:
            rows = {name: torch.cat(values).double() for name, values in found.items()}
            _tell(table, rows, torch.cat(owner), domains, {"span": f"level {lod}"})
            table.add("candidates", sum(among) / len(among), span=f"level {lod}", domain=OVERALL)
    return table


def _tell(table: Table, found: dict[str, Tensor], owner: Tensor, domains: list[str], about: dict) -> None:
    for domain in (OVERALL, *sorted(set(domains))):
        mask = torch.tensor([domain in (OVERALL, own) for own in domains])
        own, count = owner[mask], int(mask.sum())
        for name, rank in found.items():
            rows = {"carrier": name, "domain": domain, "n": count} | about
            table.add("top1", mean_interval(own, (rank[mask] == 1).double()), **rows)
            table.add("mrr", mean_interval(own, 1 / rank[mask]), **rows)
            table.add("rank", rank[mask].median().item(), **rows)
            if name != READOUT:
                table.add("lead", mean_interval(own, 1 / found[READOUT][mask] - 1 / rank[mask]), **rows)


def _others(texts: list[Text], number: int, lod: int, count: int, draw: torch.Generator) -> Tensor:
    """``count`` gists of other texts, drawn; all there are, where they are fewer."""
    own, mine = texts[number], texts[number].example.of(lod)[1]
    pool = [t.example.of(lod)[1] for n, t in enumerate(texts) if n != number and (lod > 1 or t.domain == own.domain)]
    pool = torch.cat([mine[:0], *pool])
    return pool[torch.randperm(len(pool), generator=draw)[: max(0, count)]]


@torch.no_grad()
def provisional(base: BaseLM, readout: Readout, encoder: Encoder, ids: Tensor) -> dict[str, Tensor]:
    """NLL of the blocks of a text ids [T] where an entry stands before each that says what it is about, [N - 1, K - 1].

    The entry has the place of the newest token and the length of the text's gists; each row of the block sees it. The
    first token of a block is foretold before, so it is left out. ``TRUE``, the block's own gist, says how much could be
    gained.
    """
    k = encoder.block_size
    read = prefill(base, ids[None])
    example = example_of(base, encoder, ids, states=read.hidden[0]).float()
    gists = example.of(1)[1]
    count = len(gists) - 1
    predicted, _ = readout.both(example)
    vectors = {READOUT: predicted, NEWEST: gists[:-1], MEAN: readout.total[0].expand(count, -1), TRUE: gists[1:]}
    starts = torch.arange(1, count + 1, device=ids.device) * k
    tokens = blocks(ids[None], starts[None], k)  # [1, N - 1, K]
    positions = starts[:, None] - 1 + torch.arange(k, device=ids.device)  # [N - 1, K]: the entry, and K - 1 tokens
    found = {NOTHING: nll(base, rows_at(read.hidden, starts[None], k - 1).flatten(0, 2), tokens[..., 1:].flatten())}
    for name, vector in vectors.items():
        entry = F.normalize(vector, dim=-1) * gists.norm(dim=-1).mean()
        rows = torch.cat([entry.to(base.model.dtype)[None, :, None], base.embed(tokens[..., :-1])], dim=2)
        hidden = base.forward_branches(rows, positions[None], read.cache, starts[None])[:, :, 1:]
        found[name] = nll(base, hidden.flatten(0, 2), tokens[..., 1:].flatten())
    return {name: values.view(count, k - 1).cpu() for name, values in found.items()}


def report(table: Table, title: str, about: dict, texts: int) -> Report:
    """As tables."""
    columns = [("top-1", "top1", ".3f"), ("MRR", "mrr", ".3f"), ("median rank", "rank", ".0f")]
    columns += [("lead", "lead", _signed)]
    order, sheets = [READOUT, *CONTROLS], []
    for span in [name for name in table.names("span") if name and name != "worth"]:
        for domain in table.pick(span=span, metric="rank").names("domain"):
            rows = table.pick(span=span, domain=domain)
            counted = f": {rows[0]['n']:,} gists of {texts} texts" if domain == OVERALL else ""
            heading = f"{span}, {domain}{counted}"
            sheets.append(pivot(heading, rows, columns, heading="predicted by", strong=[READOUT], order=order))
    if entries := table.pick(metric="entry"):
        columns = [("NLL of the block, less that without an entry", "entry", "+.4f")]
        sheets.append(pivot("an entry before each block", entries, columns, heading="the entry"))
    if worth := table.pick(span="worth"):
        columns = [
            ("rank correlation", "worth_rank", "+.3f"),
            ("beside the likeness of tokens", "worth_beside", "+.3f"),
        ]
        sheets.append(pivot("what opening a block is worth", worth, columns, heading="told by"))
    return Report(title, table, sheets, LEGEND, about=about)


def _signed(row: dict | None) -> str:
    return cell(row, "+.3f") if row else ""
