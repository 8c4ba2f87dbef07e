"""The picture of a leaderboard: recovery against FLOPs per block, one point per row."""

import math
from pathlib import Path

from megactx.framework.files import replacing

from .plots import COLOURS
from .summary import DROPPED

LONGEST = 40  # letters of a label
MARKERS = "osD^vP*X"
NO_BACKBONE = "no backbone"
LAST = "last token"
NEAR, APART = 1.25, 10**0.035  # up to this ratio FLOPs are nearly equal; points are so drawn this ratio apart
PANELS = {"recovery": ("all", "recovery, all h"), "recovery_body": ("body", "recovery, h >= 4")}


def plot(rows: list, path: str | Path) -> None:
    """Draw the rows of a ``Board`` (best first) to ``path``, PNG: colour by pooling, marker by head.

    Bars are the 95 % bootstrap interval of one run, or the standard deviation over seeds. The controls' lines are
    of the best row's blocks, where a report has them.
    """
    import matplotlib
    from matplotlib.figure import Figure

    poolings = list(dict.fromkeys(_pooling(row) for row in rows))
    heads = list(dict.fromkeys(_head(row) for row in rows))
    colours = dict(zip(sorted(poolings), COLOURS * 9, strict=False))
    markers = dict(zip(sorted(heads), MARKERS * 9, strict=False))
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(15, 13), dpi=100, layout="constrained")  # no pyplot: no global state, no display
        for axes, (name, (span, title)) in zip(figure.subplots(2, 1), PANELS.items(), strict=True):
            _points(axes, rows, name, colours, markers)
            _controls(axes, rows, span)
            axes.set_xscale("log")
            low, high = axes.get_ylim()
            axes.set_ylim(low, high + 0.25 * (high - low))  # room for the labels
            axes.margins(x=0.05)
            axes.grid(alpha=0.25)
            axes.set_xlabel(
                "FLOPs of the GistNet per block (log scale; points of nearly equal FLOPs stand side by side)"
            )
            axes.set_title(title)
        handles = [_mark(colour, "o", pooling) for pooling, colour in sorted(colours.items())]
        handles += [_mark("#666666", marker, f"head {head}") for head, marker in sorted(markers.items())]
        figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=8)
        with replacing(Path(path)) as part:
            figure.savefig(part, format="png")


def _points(axes, rows, name, colours, markers) -> None:
    for row, x in zip(rows, _side_by_side(rows), strict=True):
        interval, spread = row.recovery[name], row.spread[name]
        if math.isnan(interval.point):
            continue
        below, above = interval.point - interval.low, interval.high - interval.point
        if len(row.runs) > 1:
            below = above = spread
        bars = None if math.isnan(below) else [[below], [above]]
        colour = colours[_pooling(row)]
        axes.errorbar(x, interval.point, bars, fmt=markers[_head(row)], color=colour, capsize=3, markersize=7)
        rest = [f"{key}={value}" for key, value in row.label.items() if key not in ("pooling", "head", "type")]
        text = f"#{row.rank} {' '.join(rest)}".rstrip()
        text = text if len(text) <= LONGEST else f"#{row.rank}"  # the table has the rest
        at = (x, interval.point + (above if bars else 0))
        turned = dict(textcoords="offset points", rotation=90, ha="center", va="bottom", fontsize=9)
        axes.annotate(text, at, (0, 6), **turned).set_in_layout(False)  # a long one must not squeeze the axes


def _side_by_side(rows) -> list[float]:
    """x of each row: its FLOPs, or around those of the rows that have nearly as many."""
    order = sorted(range(len(rows)), key=lambda index: rows[index].flops)
    clusters: list[list[int]] = []
    for index in order:
        if clusters and rows[index].flops <= NEAR * rows[clusters[-1][0]].flops:
            clusters[-1].append(index)
        else:
            clusters.append([index])
    x = [0.0] * len(rows)
    for cluster in clusters:
        centre = math.exp(sum(math.log(rows[index].flops) for index in cluster) / len(cluster))
        cluster.sort(key=lambda index: (_pooling(rows[index]), _head(rows[index])))
        for place, index in enumerate(cluster):
            x[index] = centre * APART ** (place - (len(cluster) - 1) / 2)
    return x


def _controls(axes, rows, span: str) -> None:
    axes.axhline(0, color="black", linestyle="--", linewidth=1.2)
    axes.annotate(DROPPED, (1, 0), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9)
    blocks = rows[0].runs[0].report["block_hash"]
    reports = [row.runs[0].report for row in rows if row.runs[0].report["block_hash"] == blocks]
    told = [report["groups"]["overall"]["recovery"].get(LAST) for report in reports]
    last = next((recovery[span]["point"] for recovery in told if recovery), None)  # no report need have measured it
    if last is not None:
        axes.axhline(last, color="#666666", linestyle=":", linewidth=1.6)
        axes.annotate(LAST, (1, last), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9)


def _mark(colour, marker, label):
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker=marker, linestyle="", markersize=8, label=label)


def _pooling(row) -> str:
    settings = row.runs[0].settings
    return f"pooling {settings['gistnet.pooling']}" if "gistnet.pooling" in settings else NO_BACKBONE


def _head(row) -> str:
    return str(row.runs[0].settings.get("gistnet.head", ""))
