"""A tree and a working context as strips over the timeline, in the terminal: blocks coloured by LOD, edits marked.

``Console().print(strip(context))``; ``pictures.plot_strip`` draws the same. With the working context from before an
edit, what is new in this one is marked.
"""

import torch
from rich.text import Text
from torch import Tensor

from megactx.focus.replay import View
from megactx.memory import WorkingContext

# Okabe & Ito's colours, told apart by colour-blind readers too; LOD0, LOD1, ...; coarser ones share the last.
COLOURS = ("#009E73", "#0072B2", "#E69F00", "#CC79A7", "#666666")
GLYPHS = ("█", "▓", "▒", "░", "·")  # the same where there is no colour


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
    view = view_of(context, row)
    if columns < 1:
        raise ValueError(f"columns={columns} is not allowed: at least 1")
    tree, total = context.tree, int(context.tree.lengths[row])
    text = Text(no_wrap=True)
    for lod in range(tree.depth, 0, -1):
        covered = int(tree.counts(lod)[row]) * tree.block_size**lod
        filled = round(columns * covered / max(1, total))
        text.append(f"LOD{lod}  ").append(_glyph(lod) * filled, colour(lod)).append(" " * (columns - filled))
        text.append(f"  {int(tree.counts(lod)[row]):,} gists\n")
    text.append("sees  ")
    for finest in _finest(view, total, columns):
        text.append(" ") if finest < 0 else text.append(_glyph(finest), colour(finest))
    text.append(f"  {len(view.lod):,} entries for {view.tokens:,} tokens\n")
    if before is not None:
        new = new_in(view, view_of(before, row))
        marked = _finest(View(view.lod[new], view.index[new], view.block_size), total, columns)
        text.append("new   ").append("".join(" " if finest < 0 else "^" for finest in marked))
        text.append(f"  {int(new.sum()):,} entries\n")
    text.append("      ")
    for level in sorted({*range(1, tree.depth + 1), *view.lod.tolist()}):
        text.append(_glyph(level), colour(level)).append(
            f" {'token' if level == 0 else f'gist of {tree.block_size**level:,}'}  "
        )
    return text


def _finest(view: View, total: int, columns: int) -> list[int]:
    """The finest LOD in each column, -1 where there is none."""
    edge = torch.arange(columns + 1) * total // columns
    start, end = view.start, view.start + view.width
    out = []
    for left, right in zip(edge[:-1].tolist(), edge[1:].tolist(), strict=True):
        here = view.lod[(start < max(right, left + 1)) & (end > left)]
        out.append(int(here.min()) if len(here) else -1)
    return out


def new_in(view: View, before: View) -> Tensor:
    """Which entries were not there before, bool [W]."""
    now, then = (v.start * len(COLOURS) ** 2 + v.lod for v in (view, before))
    return ~torch.isin(now, then)


def colour(lod: int) -> str:
    """Of ``COLOURS``."""
    return COLOURS[min(lod, len(COLOURS) - 1)]


def _glyph(lod: int) -> str:
    return GLYPHS[min(lod, len(GLYPHS) - 1)]


def view_of(context: WorkingContext, row: int) -> View:
    """A row of a window.

    Raises:
        ValueError: there is no such row.
    """
    if not 0 <= row < len(context.counts):
        raise ValueError(f"row={row} is not allowed: 0 to {len(context.counts) - 1}")
    return View.of(context, row)
