"""A tree and a working context as strips over the timeline: blocks coloured by LOD, edits marked.

In the terminal, ``Console().print(strip(context))``; as a PNG, ``plot_strip(path, context)``. With the working context
from before an edit, what is new in this one is marked.
"""

from pathlib import Path

import torch
from rich.text import Text
from torch import Tensor

from megactx.framework.files import replacing
from megactx.memory import WorkingContext

# Okabe & Ito's colours, told apart by colour-blind readers too; LOD0, LOD1, ...; coarser ones share the last.
COLOURS = ("#009E73", "#0072B2", "#E69F00", "#CC79A7", "#666666")
GLYPHS = ("█", "▓", "▒", "░", "·")  # the same where there is no colour
RUNS = 400  # blocks of a row that are drawn one by one; more are joined with their neighbours of the same LOD


def strip(context: WorkingContext, before: WorkingContext | None = None, row: int = 0, columns: int = 96) -> Text:
    """One line for each level of the tree, the coarsest first, one for the working context, one for marks.

    Each column is a share of the timeline, in the colour of the finest entry in it. A level is blank where it has
    no gist yet.

    Args:
        before: the same working context before an edit; what is new since then is marked with ``^``.
        row: of the batch.
        columns: of the terminal, without the labels in front.

    Raises:
        ValueError: there is no such row, or fewer than 1 column.
    """
    _check(context, row)
    if columns < 1:
        raise ValueError(f"columns={columns} is not allowed: at least 1")
    tree, total = context.tree, int(context.tree.lengths[row])
    text = Text(no_wrap=True)
    for lod in range(tree.depth, 0, -1):
        covered = int(tree.counts(lod)[row]) * tree.block_size**lod
        filled = round(columns * covered / max(1, total))
        text.append(f"LOD{lod}  ").append(_glyph(lod) * filled, colour(lod)).append(" " * (columns - filled))
        text.append(f"  {int(tree.counts(lod)[row]):,} gists\n")
    start, width, lod = _entries(context, row)
    text.append("sees  ")
    for finest in _finest(start, width, lod, total, columns):
        text.append(" ") if finest < 0 else text.append(_glyph(finest), colour(finest))
    text.append(f"  {len(lod):,} entries for {int(width.sum()):,} tokens\n")
    if before is not None:
        new = _new(context, before, row)
        marked = _finest(start[new], width[new], lod[new], total, columns)
        text.append("new   ").append("".join(" " if finest < 0 else "^" for finest in marked))
        text.append(f"  {int(new.sum()):,} entries\n")
    text.append("      ")
    for level in sorted({*range(1, tree.depth + 1), *lod.tolist()}):
        text.append(_glyph(level), colour(level)).append(
            f" {'token' if level == 0 else f'gist of {tree.block_size**level:,}'}  "
        )
    return text


def plot_strip(path: str | Path, context: WorkingContext, before: WorkingContext | None = None, row: int = 0) -> None:
    """The same as a PNG of 1400 x 400 pixels at ``path``; block by block where they are few enough to be seen."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    _check(context, row)
    tree, total = context.tree, int(context.tree.lengths[row])
    start, width, lod = _entries(context, row)
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(14, 4), dpi=100, layout="constrained")  # no pyplot: no global state, no display
        axes = figure.subplots()
        labels = []
        for level in range(1, tree.depth + 1):
            span = tree.block_size**level
            first = torch.arange(int(tree.counts(level)[row])) * span
            bars(axes, first, torch.full_like(first, span), torch.full_like(first, level), level, total)
            labels.append(f"LOD{level}")
        bars(axes, start, width, lod, 0, total)
        labels.insert(0, "working\ncontext")
        if before is not None:
            new = _new(context, before, row)
            centre = (start + width / 2)[new]
            axes.plot(centre, torch.full_like(centre, -0.55), "^", color="black", markersize=6, clip_on=False)
            labels[0] += f"\n(^ {int(new.sum())} new)"
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(-0.7, len(labels) - 0.5)
        axes.set_xlim(0, max(1, total))
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_title(f"{len(lod):,} entries stand for {int(width.sum()):,} tokens (budget {context.budget:,})")
        levels = range(tree.depth + 1)
        names = ["token" if n == 0 else f"gist of {tree.block_size**n:,}" for n in levels]
        patches = [Patch(color=colour(n), label=name) for n, name in zip(levels, names, strict=True)]
        axes.legend(handles=patches, frameon=False, ncols=len(patches), loc="upper center", bbox_to_anchor=(0.5, -0.18))
        with replacing(path) as part:
            figure.savefig(part, format="png")


def bars(axes, start: Tensor, width: Tensor, lod: Tensor, height: float, total: int) -> None:
    """Blocks as bars at a height; many neighbours of one LOD as one bar."""
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


def _entries(context: WorkingContext, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> start, width, lod [W] of a row, without padding."""
    count = int(context.counts[row])
    return tuple(values[row, :count].cpu() for values in (context.starts(), context.widths(), context.lods()))


def _finest(start: Tensor, width: Tensor, lod: Tensor, total: int, columns: int) -> list[int]:
    """The finest LOD in each column, -1 where there is none."""
    edge = torch.arange(columns + 1) * total // columns
    end = start + width
    out = []
    for left, right in zip(edge[:-1].tolist(), edge[1:].tolist(), strict=True):
        here = lod[(start < max(right, left + 1)) & (end > left)]
        out.append(int(here.min()) if len(here) else -1)
    return out


def _new(context: WorkingContext, before: WorkingContext, row: int) -> Tensor:
    """Which entries of a row were not there before, bool [W]."""
    start, _, lod = _entries(context, row)
    old_start, _, old_lod = _entries(before, row)
    return ~torch.isin(start * len(COLOURS) ** 2 + lod, old_start * len(COLOURS) ** 2 + old_lod)


def colour(lod: int) -> str:
    """Of ``COLOURS``."""
    return COLOURS[min(lod, len(COLOURS) - 1)]


def _glyph(lod: int) -> str:
    return GLYPHS[min(lod, len(GLYPHS) - 1)]


def _check(context: WorkingContext, row: int) -> None:
    if not 0 <= row < len(context.counts):
        raise ValueError(f"row={row} is not allowed: 0 to {len(context.counts) - 1}")
