"""Recovery by block size as a picture: a panel per mode, a line per carrier."""

from pathlib import Path

from megactx.framework.files import replacing

COLOURS = ("#0072B2", "#E69F00", "#CC79A7", "#56B4E9", "#D55E00", "#8C6BB1", "#A6761D", "#666666")
SUBJECT = "#009E73"
MODES = {"recovery": "one block, h >= 1", "body": "one block, h >= 4", "history": "history"}


def plot(path: Path, ladders: dict[int, dict]) -> None:
    """Draw a PNG of block size -> combined ladder, see ``block_sizes.by_size``; an undefined recovery is left out."""
    import matplotlib
    from matplotlib.figure import Figure

    sizes, subject = list(ladders), next(iter(ladders.values()))["subject"]
    names = [name for name in ladders[sizes[0]]["carriers"] if all(name in ladders[k]["carriers"] for k in sizes)]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(name for name in names if name != subject)}
    colours[subject] = SUBJECT
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(17, 5.2), dpi=100, layout="constrained")
        for axes, (mode, title) in zip(figure.subplots(1, 3), MODES.items(), strict=True):
            axes.axhline(0, color="black", linestyle="--", linewidth=1)
            for place, name in enumerate(names):
                found = {k: ladders[k]["carriers"][name].get(mode) for k in sizes}
                found = {k: value for k, value in found.items() if value and value["point"] is not None}
                if found:
                    # Each line stands a little to the side, so that no interval hides another.
                    x = [k * 1.02 ** (place - len(names) / 2) for k in found]
                    points = [value["point"] for value in found.values()]
                    bars = _bars(list(found.values()))
                    axes.errorbar(
                        x, points, bars, color=colours[name], label=name, marker="o", capsize=2, linewidth=1.2
                    )
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [str(k) for k in sizes])
            axes.set_xlabel("tokens per block (log scale)")
            axes.set_ylabel("recovery")
            axes.set_title(title)
            axes.grid(alpha=0.25)
        handles = figure.axes[0].get_legend_handles_labels()
        if handles[0]:  # on a weak base every recovery is undefined
            figure.legend(*handles, loc="outside right upper", frameon=False, fontsize=9)
        with replacing(path) as part:
            figure.savefig(part, format="png")


def _bars(values: list[dict]) -> list[list[float]]:
    """Distances below and above; none where there is no interval."""
    below, above = [], []
    for value in values:
        point, low, high = value["point"], value["low"], value["high"]
        low, high = (point, point) if low is None else (low, high)
        below.append(max(0.0, point - low))
        above.append(max(0.0, high - point))
    return [below, above]
