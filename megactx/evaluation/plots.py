"""The picture of a run: dNLL by offset beside the controls, and the training curve."""

import csv
from pathlib import Path

from .metrics import dnll_by_offset
from .pictures import COLOURS, SUBJECT, colours_of, line, panel, picture
from .scores import BlockScores
from .summary import BEST_OF, DROPPED

SEAM = 0.1  # nats: below it the dNLL axis is linear, above it logarithmic, so that h = 0 does not hide the rest


def plot_run(
    path: str | Path,
    scores: BlockScores,
    curve: list[dict] | str | Path | None = None,
    subject: str = "gistnet",
) -> None:
    """Draw 1400 x 600 pixels to ``path`` (PNG).

    Args:
        curve: rows with ``step``, ``val/dnll``, ``val/recovery``, ``val/recovery_body``, or Lightning's metrics.csv.
    """
    with picture(path, (14, 6), columns=2, width_ratios=(1.15, 1)) as grid:
        _by_offset(grid[0, 0], scores, subject)
        _training(grid[0, 1], _rows(curve))


def plot_stages(path: str | Path, curves: dict[str, str | Path]) -> None:
    """Draw the validation curves of the stages of a curriculum, side by side, to ``path`` (PNG).

    Args:
        curves: stage -> its metrics.csv.
    """
    count = max(1, len(curves))
    with picture(path, (6 * count, 5), columns=count) as grid:
        for axes, (name, curve) in zip(grid[0], curves.items(), strict=False):
            _training(axes, _rows(curve))
            axes.set_title(name)


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

    def binned(nll):
        by_offset = dnll_by_offset(scores.full, nll)
        return [by_offset[first:end].mean().item() for first, end in bins]

    lines = {name: binned(nll) for name, nll in _quoted(scores).items()}
    colours, dropped = colours_of(lines, subject), binned(scores.drop)
    axes.axhline(0, color="black", linewidth=1)
    axes.plot(centres, dropped, color="black", linestyle="--", linewidth=2, label=DROPPED)
    for name in [*[name for name in lines if name != subject], subject]:
        own = {"linewidth": 3.2, "markersize": 6} if name == subject else {"markersize": 3}
        line(axes, zip(centres, lines[name], strict=True), color=colours[name], label=name, **own)
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
    title = f"Cost of replacing a block: {len(scores):,} blocks, {scores.documents:,} documents"
    panel(axes, title, "offset h behind the block, tokens (log scale)", f"dNLL, nats per token (linear below {SEAM})")
    axes.legend(frameon=False, fontsize=10, loc="upper right")


def _training(axes, rows: list[dict]) -> None:
    panel(axes, "Validation during training", "step", "dNLL, nats per token")
    points = {name: _points(rows, "step", f"val/{name}") for name in ("dnll", "recovery", "recovery_body")}
    if not points["dnll"][0]:
        axes.text(0.5, 0.5, "no validation was logged", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    marker = "o" if len(points["dnll"][0]) < 40 else None
    style = {"linewidth": 2, "marker": marker, "markersize": 4}
    lines = axes.plot(*points["dnll"], color=COLOURS[4], label="dNLL (left)", **style)
    axes.yaxis.label.set_color(COLOURS[4])
    axes.tick_params(axis="y", colors=COLOURS[4])
    axes.set_ylim(bottom=min(0, *points["dnll"][1]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    other = axes.twinx()
    lines += other.plot(*points["recovery"], color=SUBJECT, label="recovery, all h (right)", **style)
    style |= {"color": SUBJECT, "linestyle": "--"}
    lines += other.plot(*points["recovery_body"], label="recovery, h >= 4 (right)", **style)
    known = [value for name in ("recovery", "recovery_body") for value in points[name][1]]
    other.set_ylim(max(-1, min(0, *known, 0) * 1.05), max(1, *known, 1))  # a bad start must not flatten the rest
    other.set_ylabel("recovery (1 = as good as the block)", color=SUBJECT)
    other.tick_params(axis="y", colors=SUBJECT)
    other.spines["right"].set_visible(True)
    axes.legend(handles=lines, frameon=False, fontsize=10, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)


def _quoted(scores: BlockScores) -> dict:
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
    pairs = [(float(row[x]), float(row[y])) for row in rows if row.get(x) and row.get(y)]
    pairs = [(at, value) for at, value in pairs if value == value]
    return [at for at, _ in pairs], [value for _, value in pairs]
