"""The ladder in one picture: recovery against bytes, dNLL by offset, recovery by domain."""

from pathlib import Path

from megactx.evaluation.files import replacing

COLOURS = ("#0072B2", "#E69F00", "#CC79A7", "#56B4E9", "#D55E00", "#8C6BB1", "#A6761D", "#666666")
SUBJECT = "#009E73"
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
    axes.set_xscale("log")
    axes.grid(alpha=0.25)
    axes.axhline(0, color="black", linestyle="--", linewidth=1)
    stored = [name for name in names if numbers["carriers"][name]["bytes_per_token"]]
    seen: dict[float, int] = {}
    for name in stored:
        carrier = numbers["carriers"][name]
        x, value = carrier["bytes_per_token"], carrier["recovery"]
        place = seen[x] = seen.get(x, -1) + 1
        x *= 1.09**place  # of those with as many bytes each stands a little to the right
        axes.errorbar(x, value["point"], _bars(value), fmt="o", color=colours[name], capsize=3, markersize=7)
        axes.annotate(name, (x, value["point"]), (6, 4), textcoords="offset points", fontsize=8, rotation=25)
    axes.set_xlabel("bytes per token that is compressed, 16 bit (log scale)")
    axes.set_ylabel("recovery, h >= 1")
    axes.set_title("What a block is worth behind each carrier")


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
    if "std" in value:
        return [[value["std"]], [value["std"]]]
    if value["low"] is None:
        return None
    return [[value["point"] - value["low"]], [value["high"] - value["point"]]]
