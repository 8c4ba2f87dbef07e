"""The picture of a run: dNLL by offset beside the controls, and the training curve."""

import csv
from pathlib import Path

import torch

from megactx.framework.files import replacing

from .metrics import dnll_by_offset
from .scores import BlockScores
from .summary import BEST_OF, DROPPED

SEAM = 0.1  # nats: below it the dNLL axis is linear, above it logarithmic, so that h = 0 does not hide the rest
# Okabe & Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#E69F00", "#CC79A7", "#56B4E9", "#D55E00", "#8C6BB1", "#A6761D", "#666666")
SUBJECT_COLOUR = "#009E73"


def plot_run(
    path: str | Path,
    scores: BlockScores,
    curve: list[dict] | str | Path | None = None,
    subject: str = "gistnet",
    x: str = "step",
    prefix: str = "val/",
) -> None:
    """Draw 1400 x 600 pixels to ``path`` (PNG).

    Args:
        curve: rows with ``x`` and ``val/dnll``, ``val/recovery``, ``val/recovery_body``, or Lightning's metrics.csv.
        x: the column along the training curve, such as ``step`` or ``tokens``.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(14, 6), dpi=100, layout="constrained")  # no pyplot: no global state, no display
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        _by_offset(left, scores, subject)
        _training(right, _rows(curve), x, prefix)
        with replacing(Path(path)) as part:
            figure.savefig(part, format="png")


def plot_stages(path: str | Path, curves: dict[str, str | Path]) -> None:
    """Draw the validation curves of the stages of a curriculum, side by side, to ``path`` (PNG).

    Args:
        curves: stage -> its metrics.csv.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6 * max(1, len(curves)), 5), dpi=100, layout="constrained")
        every = figure.subplots(1, max(1, len(curves)), squeeze=False)[0]
        for axes, (name, curve) in zip(every, curves.items(), strict=False):
            _training(axes, _rows(curve), "step", "val/")
            axes.set_title(name)
        with replacing(Path(path)) as part:
            figure.savefig(part, format="png")


def offset_bins(horizon: int) -> list[tuple[int, int]]:
    """Offsets by powers of two, each octave halved: (0, 1), (1, 2), (2, 3), (3, 4), (4, 6), (6, 8), (8, 12), ..."""
    edges = [0, 1, 2, 3, 4]
    while edges[-1] < horizon:
        octave = 2 ** (edges[-1].bit_length() - 1)
        edges.append(edges[-1] + octave // 2)
    edges = [edge for edge in edges if edge < horizon] + [horizon]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _by_offset(axes, scores: BlockScores, subject: str) -> None:
    bins = offset_bins(scores.horizon)
    centres = [(first + end - 1) / 2 + 1 for first, end in bins]  # h + 1, so that h = 0 has a place on a log axis

    def line(nll):
        by_offset = dnll_by_offset(scores.full, nll)
        return [by_offset[first:end].mean().item() for first, end in bins]

    lines = {name: line(nll) for name, nll in _quoted(scores).items()}
    axes.axhline(0, color="black", linewidth=1)
    dropped = line(scores.drop)
    axes.plot(centres, dropped, color="black", linestyle="--", linewidth=2, label=DROPPED)
    colours = iter(COLOURS * 4)
    for name, values in lines.items():
        if name != subject:
            axes.plot(centres, values, color=next(colours), linewidth=1.4, marker="o", markersize=3, label=name)
    axes.plot(centres, lines[subject], color=SUBJECT_COLOUR, linewidth=3.2, marker="o", markersize=6, label=subject)

    axes.set_xscale("log", base=2)
    ticks = [h for h in (0, 1, 3, 7, 15, 31, 63, 127, 255) if h < scores.horizon]
    axes.set_xticks([h + 1 for h in ticks], [str(h) for h in ticks])
    axes.minorticks_off()
    axes.set_yscale("symlog", linthresh=SEAM, linscale=1.0)
    every = [value for values in (dropped, *lines.values()) for value in values]
    low, high = min(-0.01, 1.15 * min(every)), max(SEAM, 1.15 * max(every))
    axes.set_ylim(low, high)
    steps = [s * v for v in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20) for s in (-1, 1)] + [0]
    steps = sorted(step for step in steps if low <= step <= high)
    axes.set_yticks(steps, [f"{step:g}" for step in steps])
    axes.grid(alpha=0.25)
    axes.set_xlabel("offset h behind the block, tokens (log scale)")
    axes.set_ylabel(f"dNLL, nats per token (linear below {SEAM})")
    documents = scores.document.unique().numel()
    axes.set_title(f"Cost of replacing a block: {len(scores):,} blocks, {documents:,} documents")
    axes.legend(frameon=False, fontsize=10, loc="upper right")


def _training(axes, rows: list[dict], x: str, prefix: str) -> None:
    axes.set_title("Validation during training")
    axes.set_xlabel(x)
    points = {name: _points(rows, x, prefix + name) for name in ("dnll", "recovery", "recovery_body")}
    if not points["dnll"][0]:
        axes.text(0.5, 0.5, "no validation was logged", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    marker = "o" if len(points["dnll"][0]) < 40 else None
    style = {"linewidth": 2, "marker": marker, "markersize": 4}
    lines = axes.plot(*points["dnll"], color=COLOURS[4], label="dNLL (left)", **style)
    axes.set_ylabel("dNLL, nats per token", color=COLOURS[4])
    axes.tick_params(axis="y", colors=COLOURS[4])
    axes.set_ylim(bottom=min(0, *points["dnll"][1]))
    axes.grid(alpha=0.25)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    other = axes.twinx()
    lines += other.plot(*points["recovery"], color=SUBJECT_COLOUR, label="recovery, all h (right)", **style)
    lines += other.plot(
        *points["recovery_body"], color=SUBJECT_COLOUR, linestyle="--", label="recovery, h >= 4 (right)", **style
    )
    known = [value for name in ("recovery", "recovery_body") for value in points[name][1]]
    other.set_ylim(max(-1, min(0, *known, 0) * 1.05), max(1, *known, 1))  # a bad start must not flatten the rest
    other.set_ylabel("recovery (1 = as good as the block)", color=SUBJECT_COLOUR)
    other.tick_params(axis="y", colors=SUBJECT_COLOUR)
    other.spines["right"].set_visible(True)
    axes.legend(handles=lines, frameon=False, fontsize=10, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)


def _quoted(scores: BlockScores) -> dict[str, torch.Tensor]:
    """The carriers, of the forms of the untrained mean only the better one."""
    family = [name for name in scores.carriers if name.startswith(BEST_OF)]
    best = min(family, key=lambda name: scores.carriers[name].double().mean().item(), default=None)
    return {name: nll for name, nll in scores.carriers.items() if name not in family or name == best}


def _rows(curve) -> list[dict]:
    if isinstance(curve, (str, Path)):
        with open(curve, newline="") as file:
            return list(csv.DictReader(file))
    return list(curve or [])


def _points(rows: list[dict], x: str, y: str) -> tuple[list[float], list[float]]:
    """The rows that hold both values; Lightning leaves a cell empty where a metric was not logged at that step."""
    pairs = [
        (float(row[x]), float(row[y])) for row in rows if row.get(x) not in ("", None) and row.get(y) not in ("", None)
    ]
    pairs = [(at, value) for at, value in pairs if value == value]
    return [at for at, _ in pairs], [value for _, value in pairs]
