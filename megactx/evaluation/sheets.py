"""One table in two forms: for a terminal, and as Markdown."""

from typing import NamedTuple

LEFT = (
    "",
    "stage",
    "verdict",
    "status",
    "healthy",
    "run",
    "reason",
    "vs best",
    "in place of the block",
    "in place of the blocks",
)  # words
LEAST = 26  # columns of a column of words, where it has so many
WIDTH = 112  # columns, where the output is no terminal


class Sheet(NamedTuple):
    """One table, before it is drawn."""

    title: str
    header: list[str]
    rows: list[list[str]]
    strong: tuple[int, ...] = ()  # rows that the report is about


def print_sheet(sheet: Sheet, console=None, width: int = WIDTH) -> None:
    """Print one table, with rich."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    console = console_of(console, width)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for index, name in enumerate(sheet.header):
        words = name in LEFT
        # Words are folded where the table is too wide for the terminal, but never to nothing.
        least = min(LEAST, max(len(row[index]) for row in sheet.rows)) if words and sheet.rows else None
        align = "left" if words else "right"
        table.add_column(name, justify=align, no_wrap=not words, overflow="fold", min_width=least)
    for index, row in enumerate(sheet.rows):
        table.add_row(*map(escape, row), style="bold" if index in sheet.strong else None)
    console.print(f"\n[bold]{escape(sheet.title)}[/bold]", highlight=False)
    console.print(table)


def console_of(console=None, width: int = WIDTH):
    """A console that is wide enough for tables where the output is no terminal."""
    from rich.console import Console

    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, width)
    return console


def markdown_sheet(sheet: Sheet) -> str:
    """One table as Markdown, under its title."""
    marks = ["---" if name in LEFT else "---:" for name in sheet.header]
    lines = [f"## {sheet.title}", "", _line(sheet.header), _line(marks)]
    for index, row in enumerate(sheet.rows):
        lines.append(_line([f"**{cell}**" if cell else "" for cell in row] if index in sheet.strong else row))
    return "\n".join([*lines, ""])


def target_cells(target: dict) -> list[str]:
    """A judged target as cells: its name, what was wanted, the value reached, the dropped block's own, the status."""
    goal = target["goal"]
    if isinstance(goal, (list, tuple)):
        wanted = "{:g}-{:g}".format(*goal)
    else:
        wanted = f"{'<' if target['below'] else '>'} {goal:g}"
    reached = [number(target[name]) for name in ("value", "dropped")]
    return [target["target"], wanted, *reached, target["status"]]


def number(value: float | None, form: str = "{:.3f}") -> str:
    """``-`` for what was not measured, ``undef.`` for what is not defined."""
    if value is None:
        return "-"
    return "undef." if value != value else form.format(value)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
