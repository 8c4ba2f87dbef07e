"""The end-of-run report of a gist stage: the numbers of ``summary`` as one long table and its sheets."""

import math
from collections.abc import Callable
from pathlib import Path

from .summary import DROPPED
from .table import BLOCK, BLOCKS, OVERALL, Report, Sheet, Table, cell, pivot, stack

FIGURES = (  # heading, figure, format
    ("dNLL", "dnll", ".3f"),
    ("KL", "kl", ".3f"),
    ("recovery", "recovery", ".2f"),
    ("h>=4", "recovery_body", ".2f"),
    ("h=0", "recovery_h0", ".2f"),
    ("1-3", "recovery_h1_3", ".2f"),
    ("4-15", "recovery_h4_15", ".2f"),
    ("16-", "recovery_h16_up", ".2f"),
    ("subst.", "substitutability", ".0%"),
    ("ppl x", "ppl_ratio", ".2f"),
    ("top-1", "top1", ".0%"),
)
GEOMETRY = {  # what is healthy, in words
    "diversity": "> 0.5; < 0.3 is collapse",
    "adjacent_distance": "> 0.3 in stage 1",
    "contrastive_gap": "> 0.1",
    "cosine_std": ">= 0.1",
    "attention_entropy": "2.0-4.0 bits",
    "reconstruction_nll": "a decoder's, nats per token",
    "reconstruction_top1": "a decoder's, share of tokens",
}
LEVEL2 = "level 2"
SPANS = (("all h", "all"), ("h >= 4", "body"))
LEGEND = (
    "dNLL, KL in nats per token. recovery = 1 - sum dNLL / sum dNLL_drop, over all h, over h >= 4, and by band of h; "
    "subst. = blocks with dNLL < 1.0; ppl x = exp(dNLL); top-1 = same argmax as the full context. "
    "Intervals: 95 %, paired bootstrap over documents."
)


def report_of(numbers: dict, draw: Callable[[Path], None] | None = None) -> Report:
    """Numbers of ``summarise`` -> the report."""
    subject, table, groups = numbers["subject"], table_of(numbers), _groups(numbers)
    domains = [name for name in groups if name not in (OVERALL, LEVEL2)]
    sheets = [_group_sheet(table, subject, name, group) for name, group in groups.items() if name != LEVEL2]
    parts = [part for name, group in groups.items() for part in _against(table, subject, name, group)]
    sheets.append(stack(f"recovery of {subject}, and its difference to each control on the same blocks", *parts))
    if numbers["targets"]:
        sheets.append(target_sheet([(None, target) for target in numbers["targets"]], subject))
    if numbers["copies"]:
        sheets.append(_copy_sheet(table, numbers, domains))
    if numbers["level2"]:
        sheets.append(_group_sheet(table, subject, LEVEL2, numbers["level2"]))
    if numbers["history"]:
        sheets.append(_history_sheet(table, numbers))
    if numbers["geometry"]:
        space = table.pick(span="gist space")
        columns = [(name, {"domain": name}, ".3f") for name in (OVERALL, *domains)]
        columns.append(("healthy", {}, lambda row: GEOMETRY.get(row["metric"], "")))
        sheets.append(pivot("gist space", space, columns, "metric"))
    title = (
        f"{subject}: {numbers['blocks']:,} blocks of {numbers['documents']:,} documents, "
        f"H = {numbers['horizon']}, block hash {numbers['block_hash']}"
    )
    return Report(title, table, sheets, LEGEND, numbers["notes"], draw=draw)


def in_short(numbers: dict) -> str:
    """The result in one sentence: recovery, and how it stands to the control that is the nearest over all h."""
    subject, group = numbers["subject"], _groups(numbers)[OVERALL]
    ahead = {name: spans for name, spans in group["against"].items() if name not in group["unquoted"]}
    shown = [f"{title} {cell(group['recovery'][subject][span])}" for title, span in SPANS]
    said = f"{subject} repairs this share of what a missing block costs: {', '.join(shown)}"
    if not ahead:
        return f"{said}. No control was measured beside it."
    nearest = min(ahead, key=lambda name: point if (point := ahead[name]["all"]["point"]) == point else math.inf)
    against = [
        f"{ahead[nearest][span]['verdict']}, {title} {cell(ahead[nearest][span], '+.3f')}" for title, span in SPANS
    ]
    return f"{said}. Against {nearest}, the nearest control: {'; '.join(against)}."


def table_of(numbers: dict) -> Table:
    """The numbers as one long table."""
    table, subject = Table(), numbers["subject"]
    for domain, group in _groups(numbers).items():
        about = {"domain": domain, "n": group["documents"]}
        figures = {carrier: {k: v for k, v in row.items() if k != "quoted"} for carrier, row in group["rows"].items()}
        table.add_all(figures, "carrier", "metric", **about)
        intervals = {"recovery": group["recovery"], "ahead": group["against"]}
        table.add_all(intervals, "metric", "carrier", "span", **about)
    for distance, copied in numbers["copies"].items():
        _passages(table, "copy", copied, f"{distance} tokens on", copied["blocks"])
    if history := numbers["history"]:
        _passages(table, "history", history, "history", history["documents"])
        about = {"metric": "history_gain", "span": "history", "domain": OVERALL, "n": history["documents"]}
        table.add_all(history["gain"], "carrier", **about)
    for name, value in numbers["geometry"].items():
        domain, _, metric = name.rpartition("/")
        table.add(metric, value, carrier=subject, span="gist space", domain=domain or OVERALL)
    table.add_all(numbers.get("flops_per_block", {}), "carrier", metric="flops_per_block")
    return table


def _groups(numbers: dict) -> dict:
    return numbers["groups"] | ({LEVEL2: numbers["level2"]} if numbers["level2"] else {})


def _passages(table: Table, what: str, measured: dict, span: str, n: int) -> None:
    table.add_all(measured["cost"], "domain", metric=f"{what}_cost", span=span, n=n)
    table.add_all(measured["recovery"], "domain", "carrier", metric=f"{what}_recovery", span=span, n=n)


def _group_sheet(table: Table, subject: str, name: str, group: dict) -> Sheet:
    own = Table(row for row in table.pick(domain=name) if "span" not in row)
    measured = own.names("metric")
    order = [row for row in group["rows"] if row not in (subject, *group["unquoted"])] + [subject]
    title = "one gist of K gists in place of K^2 tokens" if name == LEVEL2 else name
    title += f": {group['blocks']:,} blocks of {group['documents']:,} documents"
    if families := [row for row in group["rows"] if "quoted" in group["rows"][row]]:
        title += f" (* the better of {len(group['unquoted']) // len(families)} forms of {', '.join(families)})"

    def label(row: str) -> str:
        return f"{group['rows'][row]['quoted']} *" if row in families else row

    columns = [column for column in FIGURES if column[1] in measured]
    return pivot(title, own, columns, heading=BLOCK, order=order, strong=[subject], label=label)


def _against(table: Table, subject: str, name: str, group: dict) -> tuple[Sheet, Sheet]:
    """Its own recovery, and below it how far it is ahead of each control."""
    own, controls = table.pick(domain=name), [row for row in group["against"] if row not in group["unquoted"]]
    first, rest = [], []
    for heading, span in SPANS:
        first += [(heading, {"metric": "recovery", "span": span}), ("verdict", {}, lambda _: "")]
        ahead = {"metric": "ahead", "span": span}
        rest += [(heading, ahead, "+.3f"), ("verdict", ahead, lambda row: row["verdict"])]
    return (
        pivot("", own, first, order=[subject], strong=[subject], label=f"{name}: {{}}".format),
        pivot("", own, rest, order=controls, label="  - {}".format),
    )


def _copy_sheet(table: Table, numbers: dict, domains: list[str]) -> Sheet:
    subject, found = numbers["subject"], numbers["copies"]
    spans = [f"{distance} tokens on" for distance in found]
    recovery, columns = table.pick(metric="copy_recovery"), [(span, {"span": span}) for span in spans]
    cost = [(span, {"span": span, "domain": OVERALL}, ".3f") for span in spans]
    carriers = recovery.pick(domain=OVERALL)
    label = f"{{}}: {subject}".format
    return stack(
        f"copy recovery: the block comes back so much later, up to {max(part['blocks'] for part in found.values()):,}"
        " blocks",
        pivot("", table, cost, "metric", BLOCK, ["copy_cost"], label=lambda _: "cost of dropping, nats"),
        pivot("", carriers, columns, order=_last(carriers.names("carrier"), subject), strong=[subject]),
        pivot("", recovery.pick(carrier=subject), columns, "domain", order=domains, label=label),
    )


def _history_sheet(table: Table, numbers: dict) -> Sheet:
    history, subject = numbers["history"], numbers["subject"]
    own, domains = table.pick(span="history"), list(history["recovery"])
    gain = "gain at equal budget, nats"
    costs = [(name, {"domain": name}, ".3f") for name in domains] + [(gain, {}, lambda _: "")]
    columns = [(name, {"metric": "history_recovery", "domain": name}) for name in domains]
    columns.append((gain, "history_gain", lambda row: cell(row, "+.3f") if row else ""))
    order = _last(own.names("carrier"), subject)
    return stack(
        f"history recovery: all blocks behind the recency window compressed, {history['segments']:,} segments of"
        f" {history['tokens']} tokens in {history['documents']:,} documents, hash {history['block_hash']}",
        pivot("", own, costs, "metric", BLOCKS, ["history_cost"], label=lambda _: "cost of no history, nats"),
        pivot("", own, columns, order=order, strong=[subject]),
    )


def _last(names: list[str], subject: str) -> list[str]:
    return [*[name for name in names if name != subject], subject]


def target_sheet(targets: list[tuple[str | None, dict]], subject: str) -> Sheet:
    """Judged targets: what was wanted, the value reached, the dropped block's own, the status.

    Args:
        targets: (stage, or ``None`` where there is but one; a target of ``summarise``, NaN or ``None`` if undefined).
    """
    rows = []
    for stage, target in targets:
        goal = target["goal"]
        sign = "<" if target["below"] else ">"
        wanted = "{:g}-{:g}".format(*goal) if isinstance(goal, (list, tuple)) else f"{sign} {goal:g}"
        reached = [cell(target[name], ".3f") for name in ("value", DROPPED)]
        rows.append([stage] * bool(stage) + [target["target"], wanted, *reached, target["status"]])
    passed = sum(row[-1] == "passed" for row in rows)
    header = ["stage"] * bool(targets and targets[0][0]) + ["", "target", subject, DROPPED, "status"]
    return Sheet(f"targets: {passed} of {len(rows)} passed", header, rows)
