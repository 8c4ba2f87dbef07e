"""The report of a lens stage: what focus is worth at each budget, as tables, JSON and a picture."""

import torch

from .bootstrap import LEAST_NATS, mean_interval, verdict
from .focus import FULL, GISTS, LENS, ORACLE, RANDOM, RECENCY, SURPRISE, FocusScores
from .pictures import panel, picture
from .table import OVERALL, Report, Sheet, Table, pivot

FEWEST_EDITS = 4  # blocks to choose, on average, below which a budget is not claimed
FEWEST_CASES = 200
TO_BEAT = (RECENCY, RANDOM, SURPRISE)
HEALTHY = {"swap_rate": "0.05-0.20", "utilisation": "0.80-1.00", "residency": ">= 3 refocuses"}
LEGEND = (
    "NLL of the tokens behind the cursor, nats per token, means over documents. cost: above the full context."
    " of the gap: share of what the gists alone lose that the policy wins back. LensNet less: below 0 it is better."
    " Intervals: 95 %, paired bootstrap over documents."
)


def summarise_focus(scores: FocusScores, horizon: int) -> dict:
    """Scores -> nested dicts of floats and strings; NaN stands for undefined."""
    document = torch.tensor(scores.document)
    out = {
        "documents": len(document.unique()),
        "windows": len(document),
        "horizon": horizon,
        "budgets": {},
        "notes": [],
    }
    for name, nll in scores.nll.items():
        table = {policy: torch.tensor(values, dtype=torch.float64) for policy, values in nll.items()}
        full, lens, gists = table[FULL], table[LENS], table[GISTS]
        lost, free, rows = float((gists - full).mean()), scores.free[name], {}
        for policy, values in table.items():
            own = slice(0, len(values))  # the oracle is measured on the first documents only
            row = {"nll": float(values.mean()), "documents": len(values)}
            row["cost"] = mean_interval(document[own], values - full[own])._asdict()
            part = float((gists[own] - full[own]).mean())
            row["of_gap"] = float((gists[own] - values).mean()) / part if part > 0.01 else float("nan")
            if policy != LENS:
                row["lens_less"] = mean_interval(document[own], lens[own] - values)._asdict()
            rows[policy] = row
        telemetry = {key: _mean(values) for key, values in scores.telemetry.get(name, {}).items()}
        claimed = sum(free) / len(free) >= FEWEST_EDITS
        out["budgets"][name] = {
            "rows": rows,
            "free_edits": sum(free) / len(free),
            "claimed": claimed,
            "telemetry": telemetry,
            "gists_lose": lost,
            "verdict": _verdict(rows, claimed),
        }
        if ORACLE in rows:
            out["budgets"][name]["regret"] = rows[ORACLE]["lens_less"]
        if not claimed:
            out["notes"].append(f"{name}: fewer than {FEWEST_EDITS} blocks can be opened, nothing is claimed.")
        if lost < 0.01:
            out["notes"].append(f"{name}: gists alone lose {lost:.3f} nat (< 0.01): there is nothing for focus to win.")
    if scores.measured:
        estimated, measured = torch.cat(scores.estimated), torch.cat(scores.measured)
        out["rank_correlation"] = _spearman(estimated, measured)
        each = [_spearman(a, b) for a, b in zip(scores.estimated, scores.measured, strict=True)]
        out["rank_correlation_within"] = _mean(each)
        out["measured_edits"], out["measured_std"] = len(measured), float(measured.std())
    return out


def focus_report(numbers: dict) -> Report:
    """Numbers of ``summarise_focus``, and of ``summarise_planted`` as ``planted``, -> the report."""
    table, notes = table_of(numbers), list(numbers["notes"])
    sheets = [_sheet(table, name, budget) for name, budget in numbers["budgets"].items()]
    columns = [(name, {"span": name}) for name in numbers["budgets"]]
    columns.append(("healthy", {}, lambda row: HEALTHY.get(row["metric"], "")))
    refocusing = Table(sorted(table.pick(carrier="per refocus"), key=lambda row: row["metric"]))
    sheets.append(pivot("refocusing, means per refocus", refocusing, columns, "metric"))
    if "rank_correlation" in numbers:
        notes.insert(
            0,
            f"Rank correlation of LensNet with {numbers['measured_edits']:,} measured values:"
            f" {numbers['rank_correlation']:.2f}, within a window {numbers['rank_correlation_within']:.2f}"
            f" (their standard deviation is {numbers['measured_std']:.4f} nat).",
        )
    if planted := numbers.get("planted"):
        sheets.append(_planted_sheet(table, planted))
        if (few := planted["kinds"][OVERALL]["usable"]) < FEWEST_CASES:
            notes.append(
                f"Planted facts: the base can use {few} cases, fewer than {FEWEST_CASES}: it is the base that limits"
                " this table, or more cases are needed (stage.evaluate.planted)."
            )
    title = (
        f"What focus is worth: {numbers['windows']} windows of {numbers['documents']} texts, H = {numbers['horizon']}"
    )
    return Report(title, table, sheets, LEGEND, notes, draw=lambda path: _plot(path, numbers["budgets"], table))


def table_of(numbers: dict) -> Table:
    """The numbers as one long table: a policy is a carrier, a budget a span; planted facts have a kind as domain."""
    table = Table()
    for budget, found in numbers["budgets"].items():
        for policy, row in found["rows"].items():
            for metric in ("nll", "cost", "of_gap", "lens_less"):
                if metric in row:
                    table.add(metric, row[metric], carrier=policy, span=budget, n=row["documents"])
        table.add("free_edits", found["free_edits"], span=budget)
        table.add_all(found["telemetry"], "metric", carrier="per refocus", span=budget)
    for kind, part in numbers.get("planted", {"kinds": {}})["kinds"].items():
        for policy, row in part["rows"].items():
            about = {"carrier": policy, "span": "planted", "domain": kind, "n": part["usable"]}
            table.add("nll", row["nll"], **about)
            if row["found"] is not None:
                table.add("found", row["found"], **about)
    return table


def _sheet(table: Table, name: str, budget: dict) -> Sheet:
    title = f"budget {name} of the tokens: {budget['free_edits']:.1f} blocks to choose. {budget['verdict']}"
    columns = [("NLL", "nll", ".3f"), ("cost", "cost", ".3f"), ("of the gap", "of_gap", ".0%")]
    columns += [("LensNet less", "lens_less", ".3f"), ("documents", "nll", lambda row: str(row["n"]))]
    return pivot(title, table.pick(span=name), columns, order=budget["rows"], strong=[LENS])


def _planted_sheet(table: Table, planted: dict) -> Sheet:
    columns = [("NLL of the answer", {"metric": "nll", "domain": OVERALL})]
    for kind, part in planted["kinds"].items():
        heading = f"{kind} ({part['usable']} of {part['cases']})"
        columns.append((heading, {"metric": "found", "domain": kind}, ".0%"))
    title = (
        f"planted facts: the needed block is in detail, of cases that the base can use; {planted['tokens']:,} tokens,"
        f" budget {planted['budget']:g}"
    )
    return pivot(title, table.pick(span="planted"), columns, strong=[LENS])


def _plot(path, budgets: dict, table: Table) -> None:
    """One panel per budget: what each policy costs above the full context, with its interval."""
    with picture(path, (6 * len(budgets), 4), columns=len(budgets)) as grid:
        for axes, (name, budget) in zip(grid[0], budgets.items(), strict=True):
            rows = [row for row in table.pick(span=name, metric="cost") if row["carrier"] != FULL]
            for place, row in enumerate(rows):
                colour = {LENS: "tab:red", ORACLE: "tab:green"}.get(row["carrier"], "tab:gray")
                error = [[row["point"] - row["low"]], [row["high"] - row["point"]]]
                axes.barh(place, row["point"], xerr=error, color=colour)
            axes.set_yticks(range(len(rows)), [row["carrier"] for row in rows])
            title = f"budget {name} of the tokens, {budget['free_edits']:.0f} blocks to choose"
            panel(axes, title, "nats per token above the full context", "")


def _verdict(rows: dict, claimed: bool) -> str:
    if not claimed:
        return "Not claimed"
    less = [rows[name]["lens_less"] for name in TO_BEAT]
    better = [verdict(each, LEAST_NATS) == "below" for each in less]
    if all(better):
        return "LensNet is better than recency, random and most surprising"
    beaten = ", ".join(name for name, is_better in zip(TO_BEAT, better, strict=True) if not is_better)
    return f"LensNet is not shown to be better than {beaten}"


def _mean(values: list[float]) -> float:
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")


def _spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    from torchmetrics.functional import spearman_corrcoef

    return float(spearman_corrcoef(a.float(), b.float()))
