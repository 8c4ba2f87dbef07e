"""The end-of-run report: the numbers of ``summary`` as tables for a terminal, as Markdown, and as JSON."""

import json
from pathlib import Path
from typing import NamedTuple

from .files import replacing
from .summary import BEST_OF, DROPPED, OVERALL

HEADING = "in place of the block"
LEFT = ("", "stage", "verdict", "status", "healthy", HEADING)  # columns of words
WIDTH = 112  # columns, where the output is no terminal
COLUMNS = {  # figure -> (heading, format)
    "dnll": ("dNLL", "{:.3f}"),
    "kl": ("KL", "{:.3f}"),
    "recovery": ("recovery", "{:.2f}"),
    "recovery_body": ("h>=4", "{:.2f}"),
    "recovery_h0": ("h=0", "{:.2f}"),
    "recovery_h1_3": ("1-3", "{:.2f}"),
    "recovery_h4_15": ("4-15", "{:.2f}"),
    "recovery_h16_up": ("16-", "{:.2f}"),
    "substitutability": ("subst.", "{:.0%}"),
    "ppl_ratio": ("ppl x", "{:.2f}"),
    "top1": ("top-1", "{:.0%}"),
}
GEOMETRY = {  # what is healthy, in words
    "diversity": "> 0.5; < 0.3 is collapse",
    "adjacent_distance": "> 0.3 in stage 1",
    "contrastive_gap": "> 0.1",
    "cosine_std": ">= 0.1",
    "attention_entropy": "2.0-4.0 bits",
    "reconstruction_nll": "a decoder's, nats per token",
    "reconstruction_top1": "a decoder's, share of tokens",
}
LEGEND = (
    "dNLL, KL in nats per token. recovery = 1 - sum dNLL / sum dNLL_drop, over all h, over h >= 4, and by band of h; "
    "subst. = blocks with dNLL < 1.0; ppl x = exp(dNLL); top-1 = same argmax as the full context. "
    "Intervals: 95 %, paired bootstrap over documents."
)


class Sheet(NamedTuple):
    """One table, before it is drawn."""

    title: str
    header: list[str]
    rows: list[list[str]]
    strong: tuple[int, ...] = ()  # rows that the report is about


def print_report(numbers: dict, console=None) -> None:
    """Print the tables, with rich."""
    console = _console(console)
    console.print(f"\n[bold]{_headline(numbers)}[/bold]")
    for sheet in _sheets(numbers):
        print_sheet(sheet, console)
    console.print(LEGEND, style="dim", highlight=False)
    for note in numbers["notes"]:
        console.print(f"! {note}", style="yellow", highlight=False)


def print_sheet(sheet: Sheet, console=None) -> None:
    """Print one table, with rich."""
    from rich import box
    from rich.table import Table

    console = _console(console)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for name in sheet.header:
        table.add_column(name, justify="left" if name in LEFT else "right", no_wrap=True)
    for index, row in enumerate(sheet.rows):
        table.add_row(*row, style="bold" if index in sheet.strong else None)
    console.print(f"\n[bold]{sheet.title}[/bold]", highlight=False)
    console.print(table)


def _console(console=None):
    from rich.console import Console

    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    return console


def markdown(numbers: dict) -> str:
    """The same tables as Markdown."""
    lines = [f"# {_headline(numbers)}", ""]
    lines += [markdown_sheet(sheet) for sheet in _sheets(numbers)]
    lines += [LEGEND, ""] + [f"- {note}" for note in numbers["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def markdown_sheet(sheet: Sheet) -> str:
    """One table as Markdown, under its title."""
    lines = [f"## {sheet.title}", "", _line(sheet.header), _line(["---", *["---:"] * (len(sheet.header) - 1)])]
    for index, row in enumerate(sheet.rows):
        lines.append(_line([f"**{cell}**" if cell else "" for cell in row] if index in sheet.strong else row))
    return "\n".join([*lines, ""])


def write_report(folder: str | Path, numbers: dict) -> None:
    """Write ``report.md`` and ``report.json``; undefined numbers are ``null`` in JSON."""
    with replacing(Path(folder) / "report.md") as part:
        part.write_text(markdown(numbers))
    with replacing(Path(folder) / "report.json") as part:
        part.write_text(json.dumps(_without_nan(numbers), indent=1, allow_nan=False))


def _headline(numbers: dict) -> str:
    return (
        f"{numbers['subject']}: {numbers['blocks']:,} blocks of {numbers['documents']:,} documents, "
        f"H = {numbers['horizon']}, block hash {numbers['block_hash']}"
    )


def _sheets(numbers: dict) -> list[Sheet]:
    sheets = [_group_sheet(numbers, name, group) for name, group in numbers["groups"].items()]
    sheets.append(_against_sheet(numbers))
    if numbers["targets"]:
        sheets.append(_target_sheet(numbers))
    if numbers["copies"]:
        sheets.append(_copy_sheet(numbers))
    if numbers["level2"]:
        sheets.append(_group_sheet(numbers, "one gist of K gists in place of K^2 tokens", numbers["level2"]))
    if numbers["geometry"]:
        sheets.append(_geometry_sheet(numbers))
    return sheets


def _group_sheet(numbers: dict, name: str, group: dict) -> Sheet:
    subject = numbers["subject"]
    order = [row for row in group["rows"] if row not in (subject, *group["unquoted"])] + [subject]
    present = [key for key in COLUMNS if any(key in group["rows"][row] for row in order)]
    rows = []
    for row in order:
        figures = group["rows"][row]
        label = f"{figures['quoted']} *" if "quoted" in figures else row
        rows.append([label, *[_number(figures.get(key), COLUMNS[key][1]) for key in present]])
    title = f"{name}: {group['blocks']:,} blocks of {group['documents']:,} documents"
    if group["unquoted"]:
        title += f" (* the better of {len(group['unquoted'])} forms of {BEST_OF})"
    return Sheet(title, [HEADING, *[COLUMNS[key][0] for key in present]], rows, (len(rows) - 1,))


def _against_sheet(numbers: dict) -> Sheet:
    subject, rows, strong = numbers["subject"], [], []
    for name, group in numbers["groups"].items():
        strong.append(len(rows))
        own = group["recovery"][subject]
        rows.append([f"{name}: {subject}", _interval(own["all"]), "", _interval(own["body"]), ""])
        for control, spans in group["against"].items():
            if control not in group["unquoted"]:
                cells = [cell for span in spans.values() for cell in (_interval(span, sign="+"), span["verdict"])]
                rows.append([f"  - {control}", *cells])
    title = f"recovery of {subject}, and its difference to each control on the same blocks"
    return Sheet(title, ["", "all h", "verdict", "h >= 4", "verdict"], rows, tuple(strong))


def _copy_sheet(numbers: dict) -> Sheet:
    subject, copied = numbers["subject"], numbers["copies"].values()
    rows = [["cost of dropping, nats", *[_number(part["cost"][OVERALL], "{:.3f}") for part in copied]]]
    carriers = list(next(iter(copied))["recovery"][OVERALL])
    for name in [*[name for name in carriers if name != subject], subject]:
        rows.append([name, *[_interval(part["recovery"][OVERALL][name]) for part in copied]])
    strong = (len(rows) - 1,)
    for domain in [name for name in numbers["groups"] if name != OVERALL]:
        cells = [part["recovery"].get(domain, {}).get(subject) for part in copied]
        rows.append([f"{domain}: {subject}", *[_interval(cell) if cell else "-" for cell in cells]])
    header = [f"{distance} tokens on" for distance in numbers["copies"]]
    blocks = max(part["blocks"] for part in copied)
    title = f"copy recovery: the block comes back so much later, up to {blocks:,} blocks"
    return Sheet(title, [HEADING, *header], rows, strong)


def _geometry_sheet(numbers: dict) -> Sheet:
    geometry, domains = numbers["geometry"], [name for name in numbers["groups"] if name != OVERALL]
    rows = []
    for name in [name for name in geometry if "/" not in name]:
        cells = [geometry[name], *[geometry.get(f"{domain}/{name}") for domain in domains]]
        rows.append([name, *[_number(cell, "{:.3f}") for cell in cells], GEOMETRY.get(name, "")])
    return Sheet("gist space", ["", OVERALL, *domains, "healthy"], rows)


def _target_sheet(numbers: dict) -> Sheet:
    rows = []
    for target in numbers["targets"]:
        goal = target["goal"]
        wanted = "{:g}-{:g}".format(*goal) if isinstance(goal, tuple) else f"{'<' if target['below'] else '>'} {goal:g}"
        value, dropped = _number(target["value"], "{:.3f}"), _number(target[DROPPED], "{:.3f}")
        rows.append([target["target"], wanted, value, dropped, target["status"]])
    passed = sum(target["status"] == "passed" for target in numbers["targets"])
    title = f"targets: {passed} of {len(rows)} passed"
    return Sheet(title, ["", "target", numbers["subject"], DROPPED, "status"], rows)


def _interval(values: dict, sign: str = "") -> str:
    if values["point"] != values["point"]:
        return "undefined"
    point = f"{values['point']:{sign}.2f}"
    if values["low"] != values["low"]:
        return f"{point} [undefined]"
    return f"{point} [{values['low']:{sign}.2f}, {values['high']:{sign}.2f}]"


def _number(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return "undef." if value != value else form.format(value)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) or value != value else value
