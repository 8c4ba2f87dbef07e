"""The ladder in one picture: recovery against bytes, dNLL by offset, recovery by domain."""

from pathlib import Path

from megactx.framework.files import replacing

COLOURS = ("#0072B2", "#E69F00", "#CC79A7", "#56B4E9", "#D55E00", "#8C6BB1", "#A6761D", "#666666")
SUBJECT = "#009E73"
SIDE, GAP = 1.05, 0.042  # between carriers of as many bytes, a factor; between their names, of the height
LINES = 7  # carriers with a line of their own in the middle panel


def plot(path: Path, numbers: dict) -> None:
    """Draw 1800 x 640 pixels to ``path`` (PNG)."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(18, 6.4), dpi=100, layout="constrained")  # no pyplot: no global state, no display
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.1, 1, 1))
        names = [name for name, carrier in numbers["carriers"].items() if _defined(carrier.get("recovery"))]
        names.sort(key=lambda name: -numbers["carriers"][name]["recovery"]["point"])
        colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
        colours[numbers["subject"]] = SUBJECT
        _bytes(left, numbers, names, colours)
        _offsets(middle, numbers, names, colours)
        _domains(right, numbers, names, colours)
        with replacing(path) as part:
            figure.savefig(part, format="png")


def _bytes(axes, numbers: dict, names: list[str], colours: dict) -> None:
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.25)
    axes.axhline(0, color="black", linestyle="--", linewidth=1)
    columns: dict[float, list[str]] = {}
    for name in names:
        if size := numbers["carriers"][name]["bytes_per_token"]:
            columns.setdefault(size, []).append(name)
    values = {name: numbers["carriers"][name]["recovery"] for found in columns.values() for name in found}
    for size, found in columns.items():
        for place, name in enumerate(found):
            x = size * SIDE ** (place % 4)  # carriers of as many bytes stand a little beside each other
            axes.errorbar(x, values[name]["point"], _bars(values[name]), fmt="o", color=colours[name], capsize=3)
    low, high = axes.get_ylim()
    for size, found in columns.items():
        heights = _apart([values[name]["point"] for name in found], (high - low) * GAP)
        for name, place, height in zip(found, range(len(found)), heights, strict=True):
            at = (size * SIDE ** (place % 4), values[name]["point"])
            leader = {"arrowstyle": "-", "color": colours[name], "alpha": 0.5, "linewidth": 0.8}
            to = (size * SIDE**8, height)
            axes.annotate(name, at, to, fontsize=8, va="center", color=colours[name], arrowprops=leader)
    if columns:
        axes.set_xlim(min(columns) / SIDE**4, max(columns) * SIDE**30)
        axes.set_xticks(sorted(columns), [f"{size:g}" for size in sorted(columns)])
        axes.minorticks_off()
    axes.set_xlabel("bytes per token that is compressed, 16 bit (log scale)")
    axes.set_ylabel("recovery, h >= 1")
    axes.set_title("What a block is worth behind each carrier")


def _apart(heights: list[float], gap: float) -> list[float]:
    """Heights in falling order, moved down where two are nearer than ``gap``."""
    out: list[float] = []
    for height in heights:
        out.append(min(height, out[-1] - gap) if out else height)
    return out


def _offsets(axes, numbers: dict, names: list[str], colours: dict) -> None:
    shown = list(dict.fromkeys([numbers["subject"], *names[:LINES]]))
    axes.plot(numbers["by_offset"]["dropped"], color="black", linestyle="--", label="dropped")
    for name in shown:
        first = numbers["carriers"][name]["first"]
        values = numbers["by_offset"][name]
        axes.plot(range(first, len(values)), values[first:], color=colours[name], label=name)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_xlabel("tokens behind the block (h)")
    axes.set_ylabel("dNLL, nats per token (symlog)")
    axes.set_title("dNLL by offset")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)


def _domains(axes, numbers: dict, names: list[str], colours: dict) -> None:
    domains = list(numbers["domains"])
    shown = list(dict.fromkeys([numbers["subject"], *names[:LINES]]))
    width = 0.8 / len(shown)
    for index, name in enumerate(shown):
        for place, domain in enumerate(domains):
            value = numbers["domains"][domain][name]
            if _defined(value):
                x = place + (index - (len(shown) - 1) / 2) * width
                label = name if not place else None
                axes.bar(x, value["point"], width, yerr=_bars(value), color=colours[name], label=label, capsize=2)
    axes.set_xticks(range(len(domains)), domains)
    axes.set_ylabel("recovery, h >= 1")
    axes.set_title("By domain")
    if axes.patches:  # on a weak base every recovery is undefined
        axes.legend(frameon=False, fontsize=8)


def _defined(value: dict | None) -> bool:
    return bool(value) and value["point"] is not None


def _bars(value: dict):
    if value["low"] is None:
        return None
    return [[max(0.0, value["point"] - value["low"])], [max(0.0, value["high"] - value["point"])]]
