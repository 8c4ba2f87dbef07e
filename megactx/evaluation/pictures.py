"""Pictures of the long table: panels with lines and marks, each mark with its interval."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megactx.framework.files import replacing

from .table import defined

# Okabe & Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#E69F00", "#CC79A7", "#56B4E9", "#D55E00", "#8C6BB1", "#A6761D", "#666666")
SUBJECT = "#009E73"
NEAR, APART = 1.25, 10**0.035  # up to this ratio two places are nearly one; marks are so drawn this ratio apart
LONGEST = 40  # letters beside a mark


@contextmanager
def picture(path: str | Path, size: tuple[float, float], rows: int = 1, columns: int = 1, **settings) -> Iterator:
    """Yield axes [rows, columns] and write them to ``path`` (PNG) afterwards, 100 pixels per unit of ``size``."""
    with canvas(size) as figure:
        yield figure.subplots(rows, columns, squeeze=False, **settings)
        with replacing(Path(path)) as part:
            figure.savefig(part, format="png")


@contextmanager
def canvas(size: tuple[float, float], dpi: int = 100) -> Iterator:
    """Yield an empty figure in this style."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        yield Figure(figsize=size, dpi=dpi, layout="constrained")  # no pyplot: no global state, no display


def panel(axes, title: str, x: str, y: str, zero: bool = False) -> None:
    """Title, labels and a grid; ``zero``: a line where nothing is gained or lost."""
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    if zero:
        axes.axhline(0, color="black", linestyle="--", linewidth=1)


def line(axes, points: Iterable[tuple], **style) -> None:
    """One line with its intervals.

    Args:
        points: (x, a number, or a row of the table); what is undefined is left out.
    """
    points = [(x, value if isinstance(value, Mapping) else {"point": value}) for x, value in points]
    points = [(x, value) for x, value in points if defined(value)]
    if points:
        spread = list(zip(*[_bars(value) for _, value in points], strict=True))
        bars = spread if any(map(any, spread)) else None
        style = {"marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.2} | style
        axes.errorbar([x for x, _ in points], [value["point"] for _, value in points], bars, **style)


def _bars(value: Mapping) -> tuple[float, float]:
    """What its interval has below and above the point; of seeds without one, their standard deviation."""
    point, std = value["point"], value.get("std")
    if defined(value, "low"):
        return max(0.0, point - value["low"]), max(0.0, value["high"] - point)
    return (std, std) if defined(std) else (0.0, 0.0)


def named(axes, x: float, value: Mapping, name: str, **style) -> None:
    """One mark with its name above it, upright; one that is too long is cut at its first word."""
    if defined(value):
        line(axes, [(x, value)], linestyle="", **{"markersize": 7} | style)
        at = (x, value["point"] + _bars(value)[1])
        turned = dict(textcoords="offset points", rotation=90, ha="center", va="bottom", fontsize=9)
        text = name if len(name) <= LONGEST else name.split()[0]
        axes.annotate(text, at, (0, 6), **turned).set_in_layout(False)  # a long one must not squeeze the axes


def room_above(axes) -> None:
    """A quarter more height, for the names of the highest marks."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.25 * (high - low))


def side_by_side(values: list[float]) -> list[float]:
    """Places on a log axis: those that are nearly one stand beside each other around it, in the order given."""
    clusters: list[list[int]] = []
    for index in sorted(range(len(values)), key=values.__getitem__):
        if clusters and values[index] <= NEAR * values[clusters[-1][0]]:
            clusters[-1].append(index)
        else:
            clusters.append([index])
    places = [0.0] * len(values)
    for cluster in clusters:
        centre = math.exp(sum(math.log(values[index]) for index in cluster) / len(cluster))
        for place, index in enumerate(sorted(cluster)):
            places[index] = centre * APART ** (place - (len(cluster) - 1) / 2)
    return places


def colours_of(names: Iterable[str], subject: str | None = None) -> dict[str, str]:
    """A colour for each name; they come again where there are many."""
    rest = [name for name in names if name != subject]
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(rest)}
    return colours | ({} if subject is None else {subject: SUBJECT})


def powers(axes, values: Iterable[float], labels: Iterable[str] | None = None) -> None:
    """A log axis with these values for ticks."""
    values = sorted({*values})
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:g}" for value in values] if labels is None else list(labels))
    axes.minorticks_off()


def legend(axes, outside: str = "", **settings) -> None:
    """What the lines are, where there are any: on a weak base every recovery is undefined.

    Args:
        outside: beside all panels, such as ``right upper``; else where there is room in this one.
    """
    handles = axes.get_legend_handles_labels()
    if handles[0]:
        settings |= {"loc": f"outside {outside}"} if outside else {}
        (axes.figure if outside else axes).legend(*handles, frameon=False, fontsize=8, **settings)
