"""Pictures: a window over its tree; of a replay the scores, and the window from refocus to refocus.

Everywhere the timeline goes from left to right and colours are LODs, as in ``strip``. What is expanded
is marked with ^, what is collapsed with v, at the middle of the tokens that it stands for.
"""

from pathlib import Path

import torch

from megactx.evaluation.pictures import canvas, picture
from megactx.focus import Edits
from megactx.focus.replay import Replay, Step, View
from megactx.framework.files import replacing
from megactx.memory import WorkingContext

from .strip import colour, new_in, view_of

RUNS = 400  # blocks of a row that are drawn one by one; more are joined with their neighbours of the same LOD


def plot_strip(path: str | Path, context: WorkingContext, before: WorkingContext | None = None, row: int = 0) -> None:
    """A tree and a window of it, as ``strip`` shows them: a PNG of 1400 x 400 pixels.

    Args:
        before: the same window before an edit; what is new since then is marked with ^.
        row: of the batch.

    Raises:
        ValueError: there is no such row.
    """
    view = view_of(context, row)
    tree, total = context.tree, int(context.tree.lengths[row])
    with picture(path, (14, 4)) as grid:
        axes = grid[0, 0]
        labels = ["working\ncontext", *(f"LOD{level}" for level in range(1, tree.depth + 1))]
        for level in range(1, tree.depth + 1):
            index = torch.arange(int(tree.counts(level)[row]))
            _strip(axes, View(torch.full_like(index, level), index, tree.block_size), level, total)
        _strip(axes, view, 0, total)
        if before is not None:
            new = new_in(view, view_of(before, row))
            centre = (view.start + view.width / 2)[new]
            axes.plot(centre, torch.full_like(centre, -0.55), "^", color="black", markersize=6, clip_on=False)
            labels[0] += f"\n(^ {int(new.sum())} new)"
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(-0.7, len(labels) - 0.5)
        axes.set_title(f"{len(view.lod):,} entries stand for {view.tokens:,} tokens (budget {context.budget:,})")
        _timeline(axes, total)
        _legend(axes, tree.block_size, tree.depth, -0.18)


def plot_scores(path: str | Path, replay: Replay, step: int = 0) -> None:
    """Scores before a refocus, with the edits that followed from them, and those of the window after it: a PNG.

    The second scores are those with which the next refocus began, so the last refocus has none.

    Args:
        step: which refocus, from 0.

    Raises:
        ValueError: nothing was recorded, or no scores after that refocus.
    """
    _check(replay)
    if not 0 <= step < len(replay.steps) - 1:
        refocuses = len(replay.steps)
        raise ValueError(f"step={step} is not allowed: 0 to {refocuses - 2}, the last but one of {refocuses} refocuses")
    now, then = replay.steps[step : step + 2]
    with picture(path, (14, 5), rows=2, sharex=True) as grid:
        panels = grid[:, 0]
        _scores(panels[0], now, replay.tokens, marked=True)
        _scores(panels[1], then, replay.tokens, marked=False)
        panels[0].set_title(_told(replay, step))
        panels[0].set_ylabel("score before")
        panels[1].set_ylabel("score after")
        _legend(panels[1], now.before.block_size, replay.depth, -0.25)


def plot_replay(path: str | Path, replay: Replay) -> None:
    """One strip per refocus, the cold start on top: a PNG. The edits of a refocus are marked below its strip.

    Raises:
        ValueError: nothing was recorded.
    """
    _check(replay)
    with picture(path, (14, 1.5 + 0.5 * len(replay.views))) as grid:
        axes = grid[0, 0]
        labels = ["start"]
        for number, view in enumerate(replay.views):
            _strip(axes, view, -number, replay.tokens)
            if number:
                edits = replay.steps[number - 1].edits
                _marks(axes, edits, view.block_size, -number - 0.42)
                labels.append(f"{number}   ^{int(edits.expand.sum())} v{int((~edits.expand).sum())}")
        axes.set_yticks(range(0, -len(labels), -1), labels)
        axes.set_ylim(-len(labels) + 0.3, 0.5)
        axes.set_ylabel("refocus")
        _timeline(axes, replay.tokens)
        _legend(axes, view.block_size, replay.depth, -0.6 / len(labels) - 0.04)


def animate_replay(path: str | Path, replay: Replay, seconds: float = 1.0) -> None:
    """One frame per refocus, with the scores and the edits that follow from them, and one of how it ended: a GIF.

    Args:
        path: ends in ``.gif``.
        seconds: that a frame is shown.

    Raises:
        ValueError: nothing was recorded, another kind of file, or no time for a frame.
    """
    from matplotlib.animation import PillowWriter

    _check(replay)
    if Path(path).suffix.lower() != ".gif":
        raise ValueError(f"path={path} is not allowed: an animation is a .gif")
    if not seconds > 0:
        raise ValueError(f"seconds={seconds} is not allowed: more than 0")
    writer = PillowWriter(fps=1 / seconds)
    with canvas((10, 3.2), dpi=80) as figure, replacing(path) as part, writer.saving(figure, str(part), dpi=80):
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        for number, view in enumerate(replay.views):
            above.clear()
            below.clear()
            if number < len(replay.steps):
                step = replay.steps[number]
                _scores(above, step, replay.tokens, marked=True)
                _strip(below, step.before, 0, replay.tokens)
                _marks(below, step.edits, view.block_size, -0.55)
                above.set_title(_told(replay, number))
            else:
                _axis_of_scores(above)
                _strip(below, view, 0, replay.tokens)
                above.set_title(f"after {number} refocuses: {len(view.lod):,} entries for {view.tokens:,} tokens")
            above.set_ylabel("score")
            below.set_yticks([0], ["window"])
            below.set_ylim(-0.8, 0.5)
            _timeline(below, replay.tokens)
            _legend(below, view.block_size, replay.depth, -0.75)
            writer.grab_frame()


def _scores(axes, step: Step, total: int, marked: bool) -> None:
    """Scores of a window's entries, each as wide as what it stands for."""
    view = step.before
    edges = torch.cat([view.start, torch.tensor([view.tokens])])
    for lod in view.lod.unique().tolist():
        axes.stairs(torch.where(view.lod == lod, step.score, 0), edges, fill=True, color=colour(lod))
    for threshold in (-step.threshold, step.threshold):
        axes.axhline(threshold, color="black", linewidth=0.6, linestyle=":")
    if marked:
        _marks(axes, step.edits, view.block_size, 1.0, -1.0)
    _axis_of_scores(axes)
    _timeline(axes, total)


def _axis_of_scores(axes) -> None:
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_ylim(-1.15, 1.15)
    axes.set_yticks([-1, 0, 1], ["collapse  -1", "0", "expand  1"])


def _strip(axes, view: View, height: float, total: int) -> None:
    """Blocks as bars at a height; many neighbours of one LOD as one bar."""
    start, width, lod = view.start, view.width, view.lod
    if len(lod) > RUNS:
        _, run, sizes = torch.unique_consecutive(lod, return_inverse=True, return_counts=True)
        first = sizes.cumsum(0) - sizes
        start, lod = start[first], lod[first]
        width = torch.zeros_like(sizes).index_add_(0, run, width)
    colours = [colour(n) for n in lod.tolist()]
    wide = (width * RUNS >= total).tolist()  # a white edge would cover what is narrower, such as most tokens
    axes.broken_barh(
        list(zip(start.tolist(), width.tolist(), strict=True)),
        (height - 0.35, 0.7),
        facecolors=colours,
        edgecolors=["white" if w else own for w, own in zip(wide, colours, strict=True)],
        linewidth=0.4,
    )


def _marks(axes, edits: Edits, block_size: int, expands: float, collapses: float | None = None) -> None:
    """Signs at these heights, collapses where expands are if no height is given."""
    width = block_size**edits.lod
    centre = edits.index * width + width / 2
    collapses = expands if collapses is None else collapses
    for sign, kind, height in (("^", edits.expand, expands), ("v", ~edits.expand, collapses)):
        here = centre[kind]
        axes.plot(here, torch.full_like(here, height), sign, color="black", markersize=5, clip_on=False)


def _timeline(axes, total: int) -> None:
    axes.set_xlim(0, max(1, total))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if axes.get_subplotspec().is_last_row():
        axes.set_xlabel("tokens")


def _legend(axes, block_size: int, depth: int, below: float) -> None:
    from matplotlib.patches import Patch

    names = ["token", *(f"gist of {block_size**lod:,}" for lod in range(1, depth + 1))]
    patches = [Patch(color=colour(lod), label=name) for lod, name in enumerate(names)]
    axes.legend(handles=patches, frameon=False, ncols=len(patches), loc="upper center", bbox_to_anchor=(0.5, below))


def _told(replay: Replay, number: int) -> str:
    """What a refocus did, in words."""
    step = replay.steps[number]
    expands = int(step.edits.expand.sum())
    made = f"{expands} expanded (^), {len(step.edits) - expands} collapsed (v)"
    price = "" if step.price is None else f"; price {step.price:.4f} nats"
    return f"refocus {number + 1} of {len(replay.steps)}: {made}{price}"


def _check(replay: Replay) -> None:
    if not replay.steps:
        raise ValueError("an empty replay cannot be drawn: Replay.refocus was not called")
