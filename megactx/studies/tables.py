"""What a study leaves behind: the same tables on the terminal and as Markdown, its rows as CSV, everything as JSON."""

import csv
import json
import tempfile
from pathlib import Path

from megactx.evaluation.files import without_nan
from megactx.evaluation.sheets import Sheet, markdown_sheet, print_sheet
from megactx.framework.files import replacing


def show(sheets: list[Sheet], notes: list[str], width: int = 170) -> None:
    """Print the tables, then what a reader must know."""
    for sheet in sheets:
        print_sheet(sheet, width=width)
    for note in notes:
        print(note)


def usable(out: Path) -> Path:
    """The folder, made if need be: what cannot be written is said before anything is measured, not after.

    Raises:
        ValueError: it cannot be a folder, or nothing can be written there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as error:
        raise ValueError(f"--out: {out} cannot be used as a folder ({error.strerror})") from error


def write(stem: Path, title: str, sheets: list[Sheet], notes: list[str], rows: list[dict], numbers: dict) -> None:
    """Write ``stem`` with ``.md``, ``.csv`` and ``.json``, each whole or not at all.

    Args:
        rows: of the CSV; a column that a row does not have stays empty.
        numbers: of the JSON; NaN becomes ``null``.
    """
    with replacing(stem.with_name(f"{stem.name}.md")) as part:
        lines = [f"# {title}", "", *map(markdown_sheet, sheets), *[f"- {note}" for note in notes], ""]
        part.write_text("\n".join(lines), encoding="utf-8")
    with replacing(stem.with_name(f"{stem.name}.csv")) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(without_nan(rows))
    with replacing(stem.with_name(f"{stem.name}.json")) as part:
        part.write_text(json.dumps(without_nan(numbers), indent=1, allow_nan=False))


def interval(value: dict | None, digits: int = 2, sign: str = "") -> str:
    """``0.50 [0.48, 0.52]``; ``undefined`` where there is no point, ``-`` where nothing was measured."""
    if value is None:
        return "-"
    point, low, high = (value[name] for name in ("point", "low", "high"))
    if point is None or point != point:
        return "undefined"
    form = f"{sign}.{digits}f"
    return f"{point:{form}}" if low is None or low != low else f"{point:{form}} [{low:{form}}, {high:{form}}]"
