"""What became of runs that learned together and apart: rows, and a table per budget."""

import torch
from torch import Tensor

from megactx.evaluation.bootstrap import mean_interval
from megactx.evaluation.sheets import Sheet, number

DROP = "newest tokens alone"


def summarise(found: list[dict], full: Tensor, document: Tensor, dropped: dict[str, list[float]]) -> list[dict]:
    """Rows: runs of one name at a budget, with the interval of their cost and of what it costs less than the first.

    Args:
        found: of ``measure_run``; those of one name are seeds, in their order.
        full: NLL of the untouched base LM over the full context, [documents].
        document: which text each is of, [documents].
        dropped: of ``dropping``.
    """
    groups, rows = {}, []
    for run in found:
        groups.setdefault(run["name"], []).append(run)
    first = next(iter(groups.values()))
    for budget, drop in dropped.items():
        for name, seeds in groups.items():
            mine, theirs = (_costs(runs, "lens", budget) - full for runs in (seeds, first))
            paired = min(len(mine), len(theirs))
            told = [value for run in seeds for value in run["swap_rate"][budget]]
            lost = [run["base_lost"] for run in seeds]
            own = torch.tensor([run["own_full"] for run in seeds], dtype=torch.float64) - full
            body = [run["recovery_body"]["point"] for run in seeds]
            rows.append(
                {
                    "run": name,
                    "seeds": len(seeds),
                    "steps": seeds[0]["steps"],
                    "tokens": seeds[0]["tokens"],
                    "flops": seeds[0]["flops"],
                    "budget": budget,
                    "cost": mean_interval(document, mine.mean(0))._asdict(),
                    "cost_of_seeds": mine.mean(1).tolist(),
                    "less": mean_interval(document, mine[:paired].mean(0) - theirs[:paired].mean(0))._asdict(),
                    "less_of_seeds": (mine[:paired] - theirs[:paired]).mean(1).tolist(),
                    "recency": mean_interval(document, (_costs(seeds, "recency", budget) - full).mean(0))._asdict(),
                    "own_full": float(own.mean()),
                    "recovery_body": sum(body) / len(body),
                    "swap_rate": sum(told) / max(1, len(told)),
                    "base_lost": sum(lost) / len(lost),
                    "adapter_parameters": seeds[0]["adapter_parameters"],
                }
            )
        cost = torch.tensor(drop, dtype=torch.float64) - full
        theirs = (_costs(first, "lens", budget) - full).mean(0)
        alone = {"run": DROP, "budget": budget, "cost": mean_interval(document, cost)._asdict()}
        rows.append(alone | {"less": mean_interval(document, cost - theirs)._asdict()})
    return rows


def _costs(runs: list[dict], kind: str, budget: str) -> Tensor:
    """[seeds, documents]"""
    return torch.tensor([run[kind][budget] for run in runs], dtype=torch.float64)


def sheet(rows: list[dict], budget: str) -> Sheet:
    """The table of one budget."""
    head = ["run", "seeds", "steps", "tokens", "FLOPs", "cost", "than the first", "of each seed", "its recency"]
    head += ["recovery h>=4", "swaps", "base lost"]
    lines = []
    for row in (row for row in rows if row["budget"] == budget):
        each = " ".join(f"{value:+.3f}" for value in row.get("less_of_seeds", []))
        counts = [f"{row[name]:,}" if row.get(name) is not None else "-" for name in ("seeds", "steps", "tokens")]
        flops = f"{row['flops']:.1e}" if row.get("flops") is not None else "-"
        line = [row["run"], *counts, flops, _interval(row["cost"]), _interval(row["less"]), each]
        if "recency" in row:
            line += [number(row["recency"]["point"]), number(row["recovery_body"], "{:.2f}")]
            line += [number(row["swap_rate"], "{:.2f}"), number(row["base_lost"], "{:+.3f}")]
        lines.append(line + ["-"] * (len(head) - len(line)))
    return Sheet(f"budget {budget} of the tokens; cost in nats per token above the untouched base LM", head, lines)


def _interval(value: dict) -> str:
    if value["low"] != value["low"]:
        return number(value["point"])
    return f"{value['point']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
