"""Runs that learned together and apart as a picture: what it brought over what it took, in tokens and in FLOPs."""

from pathlib import Path

from megactx.framework.files import replacing

COLOURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito (2008)
TAKEN = {"tokens": "training tokens", "flops": "training FLOPs"}


def plot(path: Path, rows: list[dict]) -> None:
    """Write a PNG with a line of two panels per budget; rows as ``together_report.summarise`` makes them.

    A run whose tokens or FLOPs were not counted is missing from that panel.
    """
    import matplotlib
    from matplotlib.figure import Figure

    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(row["run"] for row in rows))}
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 4.2 * len(budgets)), dpi=100, layout="constrained")
        grid = figure.subplots(len(budgets), len(TAKEN), squeeze=False)
        for budget, line in zip(budgets, grid, strict=True):
            for axes, (key, label) in zip(line, TAKEN.items(), strict=True):
                axes.axhline(0, color="black", linewidth=1)
                for row in rows:
                    if row["budget"] == budget and row.get(key):
                        _point(axes, row[key], row["less"], colours[row["run"]], row["run"])
                axes.set_xlabel(label)
                axes.set_ylabel("nats per token above the first")
                axes.set_title(f"windows of {float(budget):g} of the tokens")
                axes.grid(alpha=0.25)
        for axes in grid.flat:
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=8)
                break
        with replacing(path) as part:
            figure.savefig(part, format="png")


def _point(axes, taken: float, less: dict, colour: str, label: str) -> None:
    value, low, high = less["point"], less["low"], less["high"]
    bars = None if low is None or low != low else [[max(0.0, value - low)], [max(0.0, high - value)]]
    axes.errorbar([taken], [value], bars, color=colour, marker="o", capsize=3, linestyle="", label=label)
