"""Measured documents and cases as the long table, its sheets, sentences and pictures.

A policy is a carrier, a length of history a span, a run ``512 rebased``: the budget and how positions are.
"""

import math
from functools import partial
from pathlib import Path

import torch

from megactx.evaluation.bootstrap import mean_interval, wilson
from megactx.evaluation.pictures import legend, line, panel, picture, powers
from megactx.evaluation.planted import USABLE
from megactx.evaluation.table import OVERALL, Report, Sheet, Table, cell, pivot
from megactx.focus.allocator import RESIDENCY, SWAP_RATE, UTILISATION

from .length_planted import usable
from .length_policies import DROP, EARNED, FOCUS, FULL, KEYS, RECALLS, RECENCY

TELEMETRY = ("swap_rate", "residency", "utilisation", "reuse", "rooms")
COLOURS = {FOCUS: "#009E73", EARNED: "#CC79A7", KEYS: "#E69F00", RECENCY: "#0072B2", DROP: "black", FULL: "#D55E00"}
COLOURS |= {RECALLS[EARNED]: "#882255", RECALLS[DROP]: "#999999", RECALLS[FULL]: "#F0A080"}
STYLES = {"absolute": "--", "rebased": "-"}
ABSOLUTE = "- absolute"  # the run of full context
LINE, HEADING = ("carrier", "run"), ["policy", "budget", "positions"]  # what a line of a sheet is of, and says
PANELS = {"nll": "NLL, nats per token", "vs_dropping": "less is better than dropping, nats", "ms": "ms per token"}
PLANTED = {"found": "needed block in detail, share", "answer": "NLL of the answer, nats per token"}


def summarise(documents: list[dict], cases: list[dict]) -> Table:
    """Measured documents and cases, of ``Study.document`` and ``Study.case``, -> the long table.

    Of text ``nll``, also by block as a domain, ``vs_full``: than full context at the longest history that it reads,
    ``vs_dropping``, ``regret``: than the best policy of each text at this budget, ``ms`` per token and more; of planted
    facts ``found`` and ``answer``, by kind as a domain.
    """
    table, values = Table(), _measured(documents)
    longest = max((length for length, policy, _ in values if policy == FULL), default=None)
    text = torch.tensor([document["text"] for document in documents])
    for (length, policy, run), found in values.items():
        nll, about = _column(found, "mean"), {"carrier": policy, "span": length, "run": run, "n": len(found)}
        table.add("nll", mean_interval(text, nll), **about)
        table.add("perplexity", math.exp(nll.mean().item()), **about)
        for metric, key in (("vs_full", (longest, FULL, ABSOLUTE)), ("vs_dropping", (length, DROP, run))):
            if key in values:
                table.add(metric, mean_interval(text, nll - _column(values[key], "mean")), **about)
        if run != ABSOLUTE:
            rivals = [
                _column(own, "mean")
                for (own_length, _, own_run), own in values.items()
                if (own_length, own_run) == (length, run)
            ]
            table.add("regret", mean_interval(text, nll - torch.stack(rivals).amin(0)), **about)
        for name in TELEMETRY:
            if known := [own[name] for own in found if own.get(name) is not None]:
                table.add(name, sum(known) / len(known), **about)
        table.add("ms", 1e3 * sum(own["seconds"] for own in found) / len(found), **about)
        table.add("tree_bytes_per_token", sum(own["tree_bytes"] for own in found) / len(found) / length, **about)
        for index, value in enumerate(torch.tensor([own["nll"] for own in found]).mean(0).tolist()):
            table.add("nll", value, domain=f"block {index}", **about)
    for kind in [OVERALL, *dict.fromkeys(case["kind"] for case in cases)] * bool(cases):
        own = [case for case in cases if kind in (OVERALL, case["kind"])]
        counted = _measured([case for case in own if usable(case)])
        for length, policy, run in _measured(own):
            rows = counted.get((length, policy, run), [])
            about = {"carrier": policy, "span": length, "run": run, "domain": kind, "n": len(rows)}
            table.add("answer", sum(row["mean"] for row in rows) / len(rows) if rows else None, **about)
            if seen := [row["found"] for row in rows if row["found"] is not None]:
                table.add("found", wilson(sum(seen), len(seen)), **about)
    return table


def _measured(items: list[dict]) -> dict[tuple, list[dict]]:
    """(length, policy, run) -> a row of each item, in their order."""
    out = {}
    for item in items:
        for row in item["rows"]:
            run = f"{row['budget'] or '-'} {row['positions']}"
            out.setdefault((row["length"], row["policy"], run), []).append(row)
    return out


def _column(rows: list[dict], name: str) -> torch.Tensor:
    return torch.tensor([row[name] for row in rows], dtype=torch.float64)


def report_of(table: Table, cases: list[dict], about: dict) -> Report:
    """One sheet per length of history, then planted facts; ``about``: what decides about the figures."""
    about |= {"cases": len(cases), "usable": sum(map(usable, cases))}
    sheets = [_sheet(table.pick(span=length), about, length) for length in about["lengths"]]
    if cases:
        sheets.append(_planted_sheet(table, about))
    title, draw = "Evaluation at length", partial(plot, table, about)
    return Report(title, table, sheets, "", notes_on(table, about), about, draw)


def _sheet(own: Table, about: dict, length: int) -> Sheet:
    first = own.one(metric="tree_bytes_per_token")
    title = (
        f"T = {length:,}: the next {about['tokens']} tokens of {first['n']} documents;"
        f" the tree has {first['point']:.1f} bytes per token of history"
    )

    def but(policy: str, row: dict | None) -> str:
        return "0" if row and row["carrier"] == policy else cell(row, "+.3f")

    columns = [("perplexity", "perplexity"), ("NLL", "nll", lambda row: f"{row['point']:.3f}")]
    columns += [("dNLL vs full", "vs_full", partial(but, FULL)), ("vs dropping", "vs_dropping", partial(but, DROP))]
    columns += [("regret", "regret", "+.3f")]
    columns += [("swaps", "swap_rate", ".3f"), ("residency", "residency", ".1f"), ("in use", "utilisation", ".0%")]
    columns += [("KV reuse", "reuse", ".0%"), ("ms / token", "ms")]
    text = Table(row for row in own if "domain" not in row)
    focused = [name for name in text.names(LINE) if FOCUS in name]
    return pivot(title, text, columns, LINE, HEADING, None, focused, _label)


def _label(name: tuple[str, ...]) -> list[str]:
    return [name[0], *name[1].split()]


def _planted_sheet(table: Table, about: dict) -> Sheet:
    own, down = table.pick(domain=OVERALL), ("span", *LINE)
    columns = [("needed block in detail", "found"), ("NLL of the answer", "answer", ".3f")]
    title = f"planted facts: {about['usable']} usable ones of {about['cases']} cases"
    heading, focused = ["history", *HEADING], [name for name in own.names(down) if FOCUS in name]
    return pivot(title, own, columns, down, heading, None, focused, lambda name: [f"{name[0]:,}", *_label(name[1:])])


def notes_on(table: Table, about: dict) -> list[str]:
    """The whole system in a sentence per budget, what the columns mean, and what a reader must not overlook."""
    block, tokens = about["block_size"], about["tokens"]
    longest = max(table.pick(carrier=FULL).names("span"), default=None)
    out = [_whole(table, about, longest, budget) for budget in about["budgets"]] if longest is not None else []
    out.append(
        f"NLL in nats per token over {tokens} tokens: H = {block} tokens between refocuses, {tokens // block} times, so"
        " dNLL is dNLL@H of the whole system. Brackets: 95 %, paired bootstrap over source texts."
    )
    where = f" at T = {longest:,}, the same scored tokens" if longest else "; it fits at no length here"
    out.append(
        f"vs full: than full context{where}. vs dropping: than the sink and the newest tokens alone, same budget and"
        " positions. Regret: than what is best for each text, of all policies at that budget."
    )
    out.append(
        f"Healthy: swaps {SWAP_RATE[0]:.2f}-{SWAP_RATE[1]:.2f} of the window per refocus, residency at least"
        f" {RESIDENCY} refocuses, in use {UTILISATION[0]:.0%}-{UTILISATION[1]:.0%}. Swaps are LensNet's; collapses that"
        " make room for new tokens are not in them (rooms, in the CSV). recency has no allocator, so no swaps."
    )
    far = ", ".join(f"{length:,}" for length in about["lengths"] if length + tokens > about["most"])
    out.append(
        f"positions: rebased ones stay below {about['limit']:,}; absolute ones are possible while T + {tokens} <="
        f" {about['most']:,}, what the base takes" + (f", so not at T = {far}." if far else ".")
    )
    out.append(
        f"ms / token: {'CPU' if about['device'] == 'cpu' else 'wall'} time, read {block} tokens at a time, with what"
        " chooses and reads a window anew; the tree was there before. dropping reads its whole window each time."
    )
    if about["lensnet"] is None:
        out.append(f"There is no LensNet here, so no {FOCUS}.")
    if about["filler"]:
        out.append(f"The filler is of {about['filler']}: it is not known here whether models learned from it.")
    for domain, count in about["learned"].items():
        if count:
            out.append(f"{count:,} tokens of the filler of {domain} are of texts that models may have learned from.")
    if cases := about["cases"]:
        blocked = f"in {cases - about['usable']} of {cases} cases the base is the blocker"
        out.append(
            f"A case is usable if the needed block in detail is worth {USABLE} nats per token of the answer at T ="
            f" {about['lengths'][0]:,}, among gists; {blocked}. A refocus opens a gist by one level; the cold start had"
            f" {about['refocuses']} refocuses more than a session's."
        )
    return out


def _whole(table: Table, about: dict, length: int, budget: int) -> str:
    own = table.pick(span=length)
    parts, own = [], own.pick(run=f"{budget} absolute") or own.pick(run=f"{budget} rebased")
    for policy in (FOCUS, EARNED, RECALLS[EARNED], KEYS, RECENCY, DROP, RECALLS[DROP]):
        if row := own.one(carrier=policy, metric="vs_full"):
            swaps = own.one(carrier=policy, metric="swap_rate")
            parts.append(f"{policy} {cell(row, '+.3f')}" + (f" at {swaps['point']:.3f} swaps" if swaps else ""))
    what = f"Whole system, dNLL@{about['block_size']} against full context at T = {length:,}, W = {budget:,}"
    return f"{what}: {', '.join(parts)}."


def plot(table: Table, about: dict, path: Path) -> None:
    """NLL, against dropping, and time over the length of the history; beside it planted facts, where there are any."""
    _draw(path, Table(row for row in table if "domain" not in row), PANELS, about)
    if about["usable"]:
        _draw(path.with_name(f"{path.stem}-planted.png"), table.pick(domain=OVERALL), PLANTED, about)


def _draw(path: Path, table: Table, panels: dict[str, str], about: dict) -> None:
    """A row of panels per budget; each line is a policy, its bars are 95 % intervals."""
    budgets = about["budgets"]
    with picture(path, (5.5 * len(panels), 4.2 * len(budgets)), len(budgets), len(panels)) as grid:
        for budget, line_of_panels in zip(budgets, grid, strict=True):
            for axes, (metric, label) in zip(line_of_panels, panels.items(), strict=True):
                own = table.pick(metric=metric)
                for policy, run in own.names(LINE):
                    size, positions = run.split()
                    if size in ("-", str(budget)):
                        points = [(row["span"], row) for row in own.pick(carrier=policy, run=run)]
                        style = {"color": COLOURS[policy], "linestyle": STYLES[positions]}
                        line(axes, points, label=f"{policy}, {positions}", **style)
                powers(axes, table.names("span"), [_short(length) for length in sorted(table.names("span"))])
                panel(axes, f"W = {budget:,}", "tokens of history (log scale)", label)
        legend(grid[0, 0])


def _short(tokens: int) -> str:
    for size, name in ((2**20, "M"), (2**10, "k")):
        if tokens >= size:
            return f"{tokens / size:g}{name}"
    return str(tokens)
