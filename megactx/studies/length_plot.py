"""Evaluation at length in two pictures: cost over the length of the history, and planted facts."""

from pathlib import Path

from megactx.framework.files import replacing

from .length_policies import DROP, FOCUS, FULL, RECENCY

COLOURS = {FOCUS: "#009E73", RECENCY: "#0072B2", DROP: "black", FULL: "#D55E00"}
STYLES = {"absolute": "--", "rebased": "-"}


def plot(stem: Path, numbers: dict) -> None:
    """Write ``stem``.png: NLL, against dropping, and time; and ``stem``-planted.png where facts were planted."""
    panels = (
        (lambda row: row["nll"]["point"], None, "NLL, nats per token"),
        (lambda row: (row["vs_dropping"] or {}).get("point"), "vs_dropping", "less is better than dropping, nats"),
        (lambda row: 1e3 * row["seconds"], None, "ms per token"),
    )
    _draw(stem.with_suffix(".png"), numbers["rows"], numbers["budgets"], panels)
    if asked := [row for row in numbers["planted"] if row["kind"] == "overall" and row["usable"]]:
        panels = (
            (lambda row: row["found"] and row["found"]["point"], "found", "needed block in detail, share"),
            (lambda row: row["nll"], None, "NLL of the answer, nats per token"),
        )
        _draw(stem.with_name(f"{stem.name}-planted.png"), asked, numbers["budgets"], panels)


def _draw(path: Path, rows: list[dict], budgets: list[int], panels) -> None:
    """A row of panels per budget; each line is a policy, its bars are 95 % intervals."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        size = (5.5 * len(panels), 4.2 * len(budgets))
        figure = Figure(figsize=size, dpi=100, layout="constrained")  # no pyplot: no global state, no display
        grid = figure.subplots(len(budgets), len(panels), squeeze=False)
        for budget, line in zip(budgets, grid, strict=True):
            shown = [row for row in rows if row["budget"] in (budget, None)]
            for axes, (value, bars, label) in zip(line, panels, strict=True):
                for policy, colour in COLOURS.items():
                    for positions, style in STYLES.items():
                        own = [row for row in shown if (row["policy"], row["positions"]) == (policy, positions)]
                        points = [(row["length"], value(row), bars and row[bars]) for row in own]
                        _line(axes, [p for p in points if p[1] is not None], colour, style, f"{policy}, {positions}")
                axes.set_xscale("log", base=2)
                axes.set_xlabel("tokens of history (log scale)")
                axes.set_ylabel(label)
                axes.set_title(f"W = {budget:,}")
                axes.grid(alpha=0.25)
        grid[0][0].legend(frameon=False, fontsize=8)
        lengths = sorted({row["length"] for row in rows})
        for axes in grid.flat:
            axes.set_xticks(lengths, [_short(length) for length in lengths])
            axes.minorticks_off()
        with replacing(path) as part:
            figure.savefig(part, format="png")


def _line(axes, points: list[tuple], colour: str, style: str, label: str) -> None:
    if not points:
        return
    lengths, values, intervals = zip(*points, strict=True)
    axes.plot(lengths, values, color=colour, linestyle=style, marker="o", markersize=4, label=label)
    for length, value, ends in points:
        if ends and ends["low"] is not None and ends["low"] == ends["low"]:
            bars = [[max(0.0, value - ends["low"])], [max(0.0, ends["high"] - value)]]
            axes.errorbar([length], [value], bars, color=colour, capsize=3)


def _short(tokens: int) -> str:
    for size, name in ((2**20, "M"), (2**10, "k")):
        if tokens >= size:
            return f"{tokens / size:g}{name}"
    return str(tokens)
