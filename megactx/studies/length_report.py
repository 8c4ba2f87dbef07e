"""Measured documents and cases as tables, sentences and CSV rows."""

import math

import torch

from megactx.evaluation.bootstrap import mean_interval
from megactx.evaluation.planted import USABLE
from megactx.evaluation.sheets import Sheet, number
from megactx.focus.allocator import RESIDENCY, SWAP_RATE, UTILISATION

from .length_planted import usable
from .length_policies import DROP, FOCUS, FULL, RECENCY
from .probes_report import wilson
from .tables import interval

KEYS = ("length", "policy", "budget", "positions")
TELEMETRY = ("swap_rate", "residency", "utilisation", "reuse", "rooms")
OVERALL = "overall"


def summarise(documents: list[dict], cases: list[dict], about: dict) -> dict:
    """Plain numbers.

    Args:
        documents, cases: of ``Study.document`` and ``Study.case``.
        about: what was measured; kept as it is.

    Returns:
        ``about``; ``full_at``, the longest history that full context can read (``None``: none); ``rows``, one per
        length, policy, budget and positions; ``planted``, the same with ``kind``.
    """
    values = _table(documents)
    full_at = max((key[0] for key in values if key[1] == FULL), default=None)
    text = torch.tensor([document["text"] for document in documents])
    rows = []
    for key, found in values.items():
        length, policy, budget, positions = key
        nll = _column(found, "mean")
        full = values.get((full_at, FULL, None, "absolute"))
        dropped = values.get((length, DROP, budget, positions))
        row = dict(zip(KEYS, key, strict=True)) | {"documents": len(found)}
        row |= {"nll": mean_interval(text, nll)._asdict(), "perplexity": math.exp(nll.mean().item())}
        for name, other in (("vs_full", full), ("vs_dropping", dropped)):
            row[name] = mean_interval(text, nll - _column(other, "mean"))._asdict() if other else None
        for name in ("seconds", *TELEMETRY):
            known = [own[name] for own in found if own.get(name) is not None]
            row[name] = sum(known) / len(known) if known else None
        row["tree_bytes_per_token"] = sum(own["tree_bytes"] for own in found) / len(found) / length
        row["by_block"] = torch.tensor([own["nll"] for own in found]).mean(0).tolist()
        rows.append(row)
    return about | {"full_at": full_at, "rows": rows, "planted": _planted(cases)}


def _planted(cases: list[dict]) -> list[dict]:
    rows, kinds = [], [OVERALL, *dict.fromkeys(case["kind"] for case in cases)]
    for kind in kinds if cases else ():
        own = [case for case in cases if kind in (OVERALL, case["kind"])]
        counted = [case for case in own if usable(case)]
        for key in _table(own):
            chosen = _table(counted).get(key, [])
            found = [row["found"] for row in chosen if row["found"] is not None]
            row = dict(zip(KEYS, key, strict=True)) | {"kind": kind, "cases": len(own), "usable": len(counted)}
            row["nll"] = sum(one["mean"] for one in chosen) / len(chosen) if chosen else None
            row["found"] = None
            if found:
                low, high = wilson(sum(found), len(found))
                row["found"] = {"point": sum(found) / len(found), "low": low, "high": high}
            rows.append(row)
    return rows


def _table(items: list[dict]) -> dict[tuple, list[dict]]:
    """(length, policy, budget, positions) -> a row of each item, in their order."""
    out = {}
    for item in items:
        for row in item["rows"]:
            out.setdefault(tuple(row[name] for name in KEYS), []).append(row)
    return out


def _column(rows: list[dict], name: str) -> torch.Tensor:
    return torch.tensor([row[name] for row in rows], dtype=torch.float64)


def sheets(numbers: dict) -> list[Sheet]:
    """One table per length of history, then planted facts."""
    out = []
    for length in numbers["lengths"]:
        rows = [row for row in numbers["rows"] if row["length"] == length]
        title = (
            f"T = {length:,}: the next {numbers['tokens']} tokens of {rows[0]['documents']} documents;"
            f" the tree has {rows[0]['tree_bytes_per_token']:.1f} bytes per token of history"
        )
        header = ["policy", "budget", "positions", "perplexity", "NLL", "dNLL vs full", "vs dropping"]
        header += ["swaps", "residency", "in use", "KV reuse", "ms / token"]
        strong = tuple(place for place, row in enumerate(rows) if row["policy"] == FOCUS)
        out.append(Sheet(title, header, [_line(row) for row in rows], strong))
    if numbers["planted"]:
        out.append(_planted_sheet(numbers))
    return out


def _line(row: dict) -> list[str]:
    return [
        row["policy"],
        "-" if row["budget"] is None else f"{row['budget']:,}",
        row["positions"],
        f"{row['perplexity']:.2f}",
        f"{row['nll']['point']:.3f}",
        "0" if row["policy"] == FULL else interval(row["vs_full"], 3, "+"),
        "0" if row["policy"] == DROP else interval(row["vs_dropping"], 3, "+"),
        number(row["swap_rate"]),
        number(row["residency"], "{:.1f}"),
        number(row["utilisation"], "{:.0%}"),
        number(row["reuse"], "{:.0%}"),
        f"{1e3 * row['seconds']:.2f}",
    ]


def _planted_sheet(numbers: dict) -> Sheet:
    rows = [row for row in numbers["planted"] if row["kind"] == OVERALL]
    title = f"planted facts: {rows[0]['usable']} usable ones of {rows[0]['cases']} cases"
    header = ["history", "policy", "budget", "positions", "needed block in detail", "NLL of the answer"]
    lines = [
        [
            f"{row['length']:,}",
            row["policy"],
            "-" if row["budget"] is None else f"{row['budget']:,}",
            row["positions"],
            interval(row["found"]),
            number(row["nll"]),
        ]
        for row in rows
    ]
    return Sheet(title, header, lines, tuple(place for place, row in enumerate(rows) if row["policy"] == FOCUS))


def notes_on(numbers: dict) -> list[str]:
    """The whole system in a sentence per budget, what the columns mean, and what a reader must not overlook."""
    block, tokens, full_at = numbers["block_size"], numbers["tokens"], numbers["full_at"]
    out = [_whole(numbers, budget) for budget in numbers["budgets"]] if full_at is not None else []
    out.append(
        f"NLL in nats per token over {tokens} tokens: H = {block} tokens between refocuses, {tokens // block} times, so"
        " dNLL is dNLL@H of the whole system. Brackets: 95 %, paired bootstrap over source texts."
    )
    where = f" at T = {full_at:,}, the same scored tokens" if full_at else "; it fits at no length here"
    out.append(
        f"vs full: than full context{where}. vs dropping: than the sink and the newest tokens alone, same budget and"
        " positions."
    )
    out.append(
        f"Healthy: swaps {SWAP_RATE[0]:.2f}-{SWAP_RATE[1]:.2f} of the window per refocus, residency at least"
        f" {RESIDENCY} refocuses, in use {UTILISATION[0]:.0%}-{UTILISATION[1]:.0%}. Swaps are LensNet's; collapses that"
        " make room for new tokens are not in them (rooms, in the CSV). recency has no allocator, so no swaps."
    )
    far = [length for length in numbers["lengths"] if length + tokens > numbers["most"]]
    out.append(
        f"positions: rebased ones stay below {numbers['limit']:,}; absolute ones are possible while T + {tokens} <="
        f" {numbers['most']:,}, what the base takes"
        + (f", so not at T = {', '.join(f'{length:,}' for length in far)}." if far else ".")
    )
    out.append(
        f"ms / token: {'CPU' if numbers['device'] == 'cpu' else 'wall'} time, read {block} tokens at a time, with what"
        " chooses and reads a window anew; the tree was there before. dropping reads its whole window each time."
    )
    if numbers["lensnet"] is None:
        out.append(f"There is no LensNet here, so no {FOCUS}.")
    if numbers["filler"]:
        out.append(f"The filler is of {numbers['filler']}: it is not known here whether models learned from it.")
    for domain, count in numbers["learned"].items():
        if count:
            out.append(f"{count:,} tokens of the filler of {domain} are of texts that models may have learned from.")
    if numbers["planted"]:
        counted, cases = (numbers["planted"][0][name] for name in ("usable", "cases"))
        out.append(
            f"A case is usable if the needed block in detail is worth {USABLE} nats per token of the answer at T ="
            f" {numbers['lengths'][0]:,}, among gists; in {cases - counted} of {cases} cases the base is the blocker. A"
            f" refocus opens a gist by one level; the cold start had {numbers['refocuses']} refocuses more than a"
            " session's."
        )
    return out


def _whole(numbers: dict, budget: int) -> str:
    length, parts = numbers["full_at"], []
    for policy in (FOCUS, RECENCY, DROP):
        for row in numbers["rows"]:
            if [row[name] for name in KEYS] == [length, policy, budget, "absolute"]:
                swaps = f" at {row['swap_rate']:.3f} swaps" if row["swap_rate"] is not None else ""
                parts.append(f"{policy} {interval(row['vs_full'], 3, '+')}{swaps}")
    what = f"Whole system, dNLL@{numbers['block_size']} against full context at T = {length:,}, W = {budget:,}"
    return f"{what}: {', '.join(parts)}."


def rows_of(numbers: dict) -> list[dict]:
    """One row per line of the tables, with the planted facts of every kind behind them."""
    out = []
    for table, rows in (("text", numbers["rows"]), ("planted", numbers["planted"])):
        for row in rows:
            flat = {"table": table}
            for name, value in row.items():
                if isinstance(value, dict):
                    flat |= {name: value["point"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
                elif name != "by_block":
                    flat[name] = value
            out.append(flat)
    return out
