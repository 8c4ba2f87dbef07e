"""What became of runs that learned together and apart: the long table, a sheet per budget, a picture."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megactx.evaluation.bootstrap import mean_interval
from megactx.evaluation.pictures import colours_of, legend, line, panel, picture
from megactx.evaluation.table import Report, Sheet, Table, pivot

DROP = "newest tokens alone"
TAKEN = {"tokens": "training tokens", "flops": "training FLOPs"}
COUNTS = ("seeds", "steps", "tokens", "flops", "adapter_parameters")
LEGEND = "its recency: the cost of that run's cold starts. base lost: nats of its own NLL, without any windows."


def summarise(found: list[dict], full: Tensor, document: Tensor, dropped: dict[str, list[float]]) -> Table:
    """Runs of one name at a budget (a span), with their cost and how much less that is than the first run's.

    Args:
        found: of ``measure_run``; those of one name are seeds, in their order.
        full: NLL of the untouched base LM over the full context, [documents].
        document: which text each is of, [documents].
        dropped: of ``dropping``.
    """
    groups, table = {}, Table()
    for run in found:
        groups.setdefault(run["name"], []).append(run)
    first = next(iter(groups.values()))

    def costs(runs: list[dict], kind: str, budget: str) -> Tensor:
        return torch.tensor([run[kind][budget] for run in runs], dtype=torch.float64) - full  # [seeds, documents]

    for budget, drop in dropped.items():
        theirs = costs(first, "lens", budget)
        for name, seeds in groups.items():
            mine, about = costs(seeds, "lens", budget), {"run": name, "span": budget, "n": len(full)}
            paired = min(len(mine), len(theirs))
            less = mine[:paired] - theirs[:paired]
            table.add("cost", mean_interval(document, mine.mean(0)), **about)
            table.add("less", mean_interval(document, less.mean(0)), **about)
            table.add("recency", mean_interval(document, costs(seeds, "recency", budget).mean(0)), **about)
            for seed, values in enumerate(mine):
                table.add("cost", values.mean().item(), carrier=f"seed {seed}", **about)
            for seed, values in enumerate(less):
                table.add("less", values.mean().item(), carrier=f"seed {seed}", **about)
            own = torch.tensor([run["own_full"] for run in seeds], dtype=torch.float64) - full
            body, swaps = [run["recovery_body"]["point"] for run in seeds], [run["swap_rate"][budget] for run in seeds]
            means = {"own_full": float(own.mean()), "recovery_body": sum(body) / len(body)}
            means["swap_rate"] = sum(map(sum, swaps)) / max(1, sum(map(len, swaps)))
            means["base_lost"] = sum(run["base_lost"] for run in seeds) / len(seeds)
            counts = {"seeds": len(seeds)} | {name: seeds[0][name] for name in COUNTS[1:]}
            table.add_all(means | counts, "metric", **about)
        cost, about = torch.tensor(drop, dtype=torch.float64) - full, {"run": DROP, "span": budget, "n": len(full)}
        table.add("cost", mean_interval(document, cost), **about)
        table.add("less", mean_interval(document, cost - theirs.mean(0)), **about)
    return table


def report_of(table: Table, about: dict) -> Report:
    """The report; ``about``: ``documents``, ``tokens``, ``horizon``, ``base``, and ``full``, the base LM's own NLL."""
    sheets = [sheet(table, budget) for budget in table.names("span")]
    note = (
        f"{about['documents']} held-out documents of {about['tokens']:,} tokens, H = {about['horizon']}; the untouched"
        f" base LM has {about['full']:.3f} nats per token there. Means over seeds; intervals: 95 %, paired bootstrap"
        " over documents."
    )
    title = "Learned together, learned apart"
    return Report(title, table, sheets, LEGEND, [note], about, partial(plot, table))


def sheet(table: Table, budget: str) -> Sheet:
    """The sheet of one budget."""

    def each(row: dict) -> str:
        seeds = table.pick(metric="less", run=row["run"], span=budget)
        return " ".join(f"{row['point']:+.3f}" for row in seeds if "carrier" in row)

    def count(row: dict | None, form: str = ",") -> str:
        return "-" if row is None or row["point"] is None else format(row["point"], form)

    columns = [(name, name, count) for name in ("seeds", "steps", "tokens")]
    columns += [("FLOPs", "flops", partial(count, form=".1e")), ("cost", "cost", ".3f")]
    columns += [("than the first", "less", ".3f"), ("of each seed", "less", each)]
    columns += [("its recency", "recency", lambda row: "-" if row is None else f"{row['point']:.3f}")]
    columns += [("recovery h>=4", "recovery_body"), ("swaps", "swap_rate"), ("base lost", "base_lost", "+.3f")]
    title = f"budget {budget} of the tokens; cost in nats per token above the untouched base LM"
    return pivot(title, table.pick(span=budget), columns, "run", "run")


def plot(table: Table, path: Path) -> None:
    """What it brought over what it took: a line of two panels per budget; what was not counted is missing there."""
    budgets, colours = table.names("span"), colours_of(table.names("run"))
    with picture(path, (12, 4.2 * len(budgets)), len(budgets), len(TAKEN)) as grid:
        for budget, panels in zip(budgets, grid, strict=True):
            for axes, (metric, label) in zip(panels, TAKEN.items(), strict=True):
                for row in table.pick(metric="less", span=budget, carrier=None):
                    taken = table.one(metric=metric, run=row["run"], span=budget)
                    if taken and taken["point"]:
                        line(axes, [(taken["point"], row)], color=colours[row["run"]], label=row["run"])
                title = f"windows of {float(budget):g} of the tokens"
                panel(axes, title, label, "nats per token above the first", zero=True)
        for axes in grid.flat:
            legend(axes)
