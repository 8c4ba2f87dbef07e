"""What is measured is one long table, whoever measured it: a row per figure, written as CSV, JSON and readable sheets.

run                a run, a seed, or the setting that runs differ in
carrier            what stood in place of the block; of windows, the policy
span               over which tokens: ``all``, ``body``, a horizon, a length, a budget
domain             of the text, ``overall`` for all of it; of questions, their class
metric             ``recovery``, ``dnll``, ``bytes`` ...
point, low, high   the figure, and its 95 % interval where it has one
std                standard deviation over seeds, where several are one
n                  what it is a mean over: documents, questions
"""

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from megactx.framework.files import replacing, write

COLUMNS = ("run", "carrier", "span", "domain", "metric", "point", "low", "high", "std", "n")
OVERALL = "overall"
BLOCK, BLOCKS = "in place of the block", "in place of the blocks"  # headings of what stands there
LEFT = {"", "stage", "verdict", "status", "healthy", "run", "policy", "reason", "vs best", BLOCK, BLOCKS}  # words
LEFT |= {"asked", "answered"}
LEAST = 26  # columns of a column of words, where it has so many
WIDTH = 112  # columns, where the output is no terminal


class Table(list):
    """Rows: dicts with those of ``COLUMNS`` that say something."""

    def add(self, metric: str, value, **about) -> None:
        """One figure: a number, ``None``, an ``Interval``, or a dict of ``point``, ``low``, ``high`` and more."""
        self.append({**about, "metric": metric, **_parts(value)})

    def add_all(self, values, *columns: str, **about) -> None:
        """Figures that dicts hold by what stands in these columns, the outermost first, such as carrier and metric."""
        if not columns:
            self.append({**about, **_parts(values)})
        else:
            for name, inner in values.items():
                self.add_all(inner, *columns[1:], **about, **{columns[0]: name})

    def pick(self, **wanted) -> "Table":
        """The rows that have these values."""
        return Table(row for row in self if all(row.get(name) == value for name, value in wanted.items()))

    def one(self, **wanted) -> dict | None:
        """The first row that has these values."""
        return next((row for row in self if all(row.get(name) == value for name, value in wanted.items())), None)

    def point(self, **wanted) -> float:
        """The figure of that row; NaN where it is undefined, or not there."""
        row = self.one(**wanted)
        return row["point"] if row and defined(row) else math.nan

    def names(self, column: str | tuple[str, ...]) -> list:
        """What stands in a column, or in several as tuples, in the order in which it came."""
        if isinstance(column, tuple):
            return list(dict.fromkeys(tuple(map(row.get, column)) for row in self))
        return list(dict.fromkeys(row[column] for row in self if column in row))

    def ranked(self, **wanted) -> list[str]:
        """Carriers by a figure, best first; those of which it is undefined come last."""
        points = {name: self.point(carrier=name, **wanted) for name in self.names("carrier")}
        return sorted(points, key=lambda name: math.inf if math.isnan(points[name]) else -points[name])


def _parts(value) -> dict:
    if isinstance(value, Mapping):
        return dict(value)
    return value._asdict() if hasattr(value, "_asdict") else {"point": value}


def defined(value: Mapping | float | None, part: str = "point") -> bool:
    """Whether a figure, or a row's ``part`` of it, is a number."""
    value = value.get(part) if isinstance(value, Mapping) else value
    return value is not None and not math.isnan(value)


def cell(value, form: str = ".2f") -> str:
    """``0.50 [0.48, 0.52] ± 0.012``; ``undefined`` where there is no number, ``-`` where nothing was measured."""
    if value is None or isinstance(value, str):
        return value or "-"
    parts = _parts(value)
    if not defined(parts):
        return "undefined"
    text = format(parts["point"], form)
    if defined(parts, "low"):
        text += f" [{parts['low']:{form}}, {parts['high']:{form}}]"
    return text + (f" ± {parts['std']:.{int(form[-2]) + 1}f}" if defined(parts, "std") else "")


def without_nan(value):
    """Nested dicts and lists for JSON, which has no NaN and no infinity: ``None`` in their place."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Sheet(NamedTuple):
    """A part of the table as a person reads it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    strong: tuple[int, ...] = ()  # rows that the report is about

    def markdown(self, text: str = "", level: int = 2) -> str:
        """Under its title, with a text between, where there is one."""
        marks = ["---" if name in LEFT else "---:" for name in self.header]
        lines = [f"{'#' * level} {self.title}", "", *[text, ""] * bool(text), _line(self.header), _line(marks)]
        for index, row in enumerate(self.rows):
            strong = index in self.strong
            lines.append(_line([f"**{cell}**" if cell else "" for cell in row] if strong else row))
        return "\n".join([*lines, ""])


class Column(NamedTuple):
    """A column of a sheet: which row of the table stands in a cell, and how."""

    heading: str
    wanted: Mapping | str  # what the row has, beside the name of the line; a text: its metric
    form: str | Callable[[dict | None], str] = ".2f"

    def cell(self, table: Table, **line) -> str:
        """Its cell in the line of these values."""
        wanted = {"metric": self.wanted} if isinstance(self.wanted, str) else self.wanted
        row = table.one(**{**line, **wanted})
        return self.form(row) if callable(self.form) else cell(row, self.form)


def pivot(
    title: str,
    table: Table,
    columns: Iterable[tuple],
    down: str | tuple[str, ...] = "carrier",
    heading: str | list[str] = "",
    order: Iterable | None = None,
    strong: Iterable = (),
    label: Callable[[object], str | list[str]] = str,
) -> Sheet:
    """A sheet with a line for each name in one column of the table, or each pair of names in two.

    Args:
        columns: as ``Column`` takes them.
        down: the column of the table, or the columns.
        order: names, where they are not all, or in another order.
        strong: names that the report is about.
        label: name -> what stands before its line, under ``heading``.
    """
    names, columns = list(table.names(down) if order is None else order), [Column(*column) for column in columns]
    lines = []
    for name in names:
        line = {down: name} if isinstance(down, str) else dict(zip(down, name, strict=True))
        lines.append(_listed(label(name)) + [column.cell(table, **line) for column in columns])
    bold = tuple(index for index, name in enumerate(names) if name in strong)
    return Sheet(title, _listed(heading) + [column.heading for column in columns], lines, bold)


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def stack(title: str, *parts: Sheet) -> Sheet:
    """Sheets with one header, one below the other."""
    before = [sum(len(part.rows) for part in parts[:index]) for index in range(len(parts))]
    strong = [start + index for start, part in zip(before, parts, strict=True) for index in part.strong]
    return Sheet(title, parts[0].header, [row for part in parts for row in part.rows], tuple(strong))


@dataclass
class Report:
    """The long table of one measurement and what is shown of it: sheets, sentences, a picture.

    Args:
        legend: what the columns mean.
        notes: what a reader must know.
        about: of the JSON file, beside the table.
        draw: draws the picture to a path; ``None``: there is none.
        width: columns of the terminal's sheets where the output is no terminal.
    """

    title: str
    table: Table
    sheets: list[Sheet]
    legend: str = ""
    notes: list[str] = field(default_factory=list)
    about: dict = field(default_factory=dict)
    draw: Callable[[Path], None] | None = None
    width: int = WIDTH

    def show(self, console=None) -> None:
        """Print everything, with rich."""
        from rich.console import Console

        console = console or Console()
        if not console.is_terminal:
            console.width = max(console.width, self.width)
        console.print(f"\n{self.title}", style="bold", markup=False, highlight=False)
        for sheet in self.sheets:
            console.print(f"\n{sheet.title}", style="bold", markup=False, highlight=False)
            console.print(_rich(sheet))
        if self.legend:
            console.print(self.legend, style="dim", markup=False, highlight=False)
        for note in self.notes:
            console.print(f"! {note}", style="yellow", markup=False, highlight=False)

    def markdown(self) -> str:
        """The same as Markdown."""
        parts = [f"# {self.title}", "", *[sheet.markdown() for sheet in self.sheets]]
        parts += [self.legend, ""] * bool(self.legend) + [f"- {note}" for note in self.notes]
        return "\n".join(parts).rstrip() + "\n"

    def _shown(self) -> dict:
        return {
            "title": self.title,
            "sheets": [sheet._asdict() for sheet in self.sheets],
            "legend": self.legend,
            "notes": self.notes,
        }

    @classmethod
    def read(cls, stem: Path) -> "Report":
        """What ``write`` has written, from ``.json`` and ``.csv`` alone; without the picture.

        Raises:
            ValueError: there is none, or one of an older release.
        """
        path = stem.with_name(f"{stem.name}.json")
        try:
            numbers = json.loads(path.read_text(encoding="utf-8"))
            shown = numbers.pop("shown")
            with stem.with_name(f"{stem.name}.csv").open(newline="", encoding="utf-8") as file:
                rows = [
                    {name: _read(name, value) for name, value in row.items() if value} for row in csv.DictReader(file)
                ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: there is no report in it that can be shown ({error!r})") from error
        sheets = [Sheet(**sheet | {"strong": tuple(sheet["strong"])}) for sheet in shown["sheets"]]
        return cls(shown["title"], Table(rows), sheets, shown["legend"], shown["notes"], numbers)

    def write(self, stem: Path, numbers: Mapping | None = None) -> str:
        """Write ``stem`` with ``.md``, ``.csv``, ``.json``, ``.png`` where there is a picture; -> a line that says so.

        Args:
            numbers: of the JSON file in place of ``about`` and the table; NaN becomes ``null``. What is shown is in it
                too, for ``read``.
        """
        numbers = self.about | {"table": self.table} if numbers is None else dict(numbers)
        numbers |= {"shown": self._shown()}
        md, csv_file, json_file, png = (stem.with_name(f"{stem.name}.{end}") for end in ("md", "csv", "json", "png"))
        write(md, self.markdown())
        with replacing(csv_file) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(without_nan(self.table))
        write(json_file, json.dumps(without_nan(numbers), indent=1, allow_nan=False))
        if self.draw:
            self.draw(png)
        return f"Tables: {stem}.md, .csv and .json" + f"   picture: {stem}.png" * bool(self.draw)


def _read(name: str, value: str) -> str | float | int:
    return int(value) if name == "n" else float(value) if name in ("point", "low", "high", "std") else value


def _rich(sheet: Sheet):
    from rich import box
    from rich.markup import escape
    from rich.table import Table as RichTable

    table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for index, name in enumerate(sheet.header):
        words = name in LEFT
        # Words are folded where the table is too wide for the terminal, but never to nothing.
        least = min(LEAST, max(len(row[index]) for row in sheet.rows)) if words and sheet.rows else None
        align = "left" if words else "right"
        table.add_column(name, justify=align, no_wrap=not words, overflow="fold", min_width=least)
    for index, row in enumerate(sheet.rows):
        table.add_row(*map(escape, row), style="bold" if index in sheet.strong else None)
    return table


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
