"""The report of a lens stage: what focus is worth at each budget, as tables, JSON and a picture."""

import json
from pathlib import Path

import torch

from megactx.framework.files import replacing

from .bootstrap import LEAST_NATS, Interval, mean_interval, verdict
from .files import without_nan
from .focus import FULL, GISTS, LENS, ORACLE, RANDOM, RECENCY, SURPRISE, FocusScores
from .sheets import Sheet, console_of, markdown_sheet, number, print_sheet

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


def report_focus(folder: Path, numbers: dict, console=None) -> None:
    """Print the tables and write ``report.md``, ``report.json`` and ``report.png``."""
    console = console_of(console)
    head = (
        f"What focus is worth: {numbers['windows']} windows of {numbers['documents']} texts, H = {numbers['horizon']}"
    )
    console.print(f"\n[bold]{head}[/bold]")
    sheets = [_sheet(name, budget) for name, budget in numbers["budgets"].items()]
    sheets.append(_telemetry_sheet(numbers))
    if "planted" in numbers:
        sheets.append(_planted_sheet(numbers["planted"]))
    for sheet in sheets:
        print_sheet(sheet, console)
    lines = list(numbers["notes"])
    if "rank_correlation" in numbers:
        lines.insert(
            0,
            f"Rank correlation of LensNet with {numbers['measured_edits']:,} measured values:"
            f" {numbers['rank_correlation']:.2f}, within a window {numbers['rank_correlation_within']:.2f}"
            f" (their standard deviation is {numbers['measured_std']:.4f} nat).",
        )
    console.print(LEGEND, style="dim", highlight=False)
    if "planted" in numbers and (few := numbers["planted"]["kinds"]["overall"]["usable"]) < FEWEST_CASES:
        lines.append(
            f"Planted facts: the base can use {few} cases, fewer than {FEWEST_CASES}: it is the base that limits this"
            " table, or more cases are needed (stage.evaluate.planted)."
        )
    for line in lines:
        console.print(f"! {line}", style="yellow", highlight=False)
    text = "\n".join([f"# {head}", "", *map(markdown_sheet, sheets), LEGEND, "", *(f"- {line}" for line in lines)])
    with replacing(folder / "report.md") as part:
        part.write_text(text.rstrip() + "\n")
    with replacing(folder / "report.json") as part:
        part.write_text(json.dumps(without_nan(numbers), indent=1, allow_nan=False))
    plot_focus(folder / "report.png", numbers)


def plot_focus(path: Path, numbers: dict) -> None:
    """One panel per budget: what each policy costs above the full context, with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    budgets = numbers["budgets"]
    figure, panels = plt.subplots(1, len(budgets), figsize=(6 * len(budgets), 4), squeeze=False, layout="constrained")
    for panel, (name, budget) in zip(panels[0], budgets.items(), strict=True):
        rows = {policy: row["cost"] for policy, row in budget["rows"].items() if policy != FULL}
        for place, (policy, cost) in enumerate(rows.items()):
            color = "tab:red" if policy == LENS else "tab:green" if policy == ORACLE else "tab:gray"
            error = [[cost["point"] - cost["low"]], [cost["high"] - cost["point"]]]
            panel.barh(place, cost["point"], xerr=error, color=color)
        panel.set_yticks(range(len(rows)), list(rows))
        panel.set_xlabel("nats per token above the full context")
        panel.set_title(f"budget {name} of the tokens, {budget['free_edits']:.0f} blocks to choose")
    with replacing(path) as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)


def _sheet(name: str, budget: dict) -> Sheet:
    rows, strong = [], ()
    for policy, row in budget["rows"].items():
        if policy == LENS:
            strong = (len(rows),)
        rows.append(
            [policy, number(row["nll"]), _interval(row["cost"]), number(row["of_gap"], "{:.0%}")]
            + [_interval(row["lens_less"]) if "lens_less" in row else "-", str(row["documents"])]
        )
    title = f"budget {name} of the tokens: {budget['free_edits']:.1f} blocks to choose. {budget['verdict']}"
    return Sheet(title, ["", "NLL", "cost", "of the gap", "LensNet less", "documents"], rows, strong)


def _telemetry_sheet(numbers: dict) -> Sheet:
    budgets = numbers["budgets"]
    names = sorted({key for budget in budgets.values() for key in budget["telemetry"]})
    rows = [
        [key, *(number(budget["telemetry"].get(key), "{:.2f}") for budget in budgets.values()), HEALTHY.get(key, "")]
        for key in names
    ]
    return Sheet("refocusing, means per refocus", ["", *budgets, "healthy"], rows)


def _planted_sheet(planted: dict) -> Sheet:
    kinds, rows = planted["kinds"], []
    for policy in next(iter(kinds.values()))["rows"]:
        found = [kind["rows"][policy]["found"] for kind in kinds.values()]
        loss = number(kinds["overall"]["rows"][policy]["nll"], "{:.2f}")
        rows.append([policy, loss, *(number(share, "{:.0%}") for share in found)])
    strong = tuple(index for index, row in enumerate(rows) if row[0] == LENS)
    named = [f"{kind} ({part['usable']} of {part['cases']})" for kind, part in kinds.items()]
    title = (
        f"planted facts: the needed block is in detail, of cases that the base can use; {planted['tokens']:,} tokens,"
        f" budget {planted['budget']:g}"
    )
    return Sheet(title, ["", "NLL of the answer", *named], rows, strong)


def _verdict(rows: dict, claimed: bool) -> str:
    if not claimed:
        return "Not claimed"
    less = [rows[name]["lens_less"] for name in TO_BEAT]
    better = [verdict(Interval(each["point"], each["low"], each["high"]), LEAST_NATS) == "below" for each in less]
    if all(better):
        return "LensNet is better than recency, random and most surprising"
    beaten = ", ".join(name for name, is_better in zip(TO_BEAT, better, strict=True) if not is_better)
    return f"LensNet is not shown to be better than {beaten}"


def _interval(value: dict) -> str:
    if value["low"] != value["low"]:
        return number(value["point"])
    return f"{value['point']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _mean(values: list[float]) -> float:
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")


def _spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    from torchmetrics.functional import spearman_corrcoef

    return float(spearman_corrcoef(a.float(), b.float()))
