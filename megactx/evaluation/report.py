"""The end-of-run report: the numbers of ``summary`` as tables for a terminal, as Markdown, and as JSON."""

import json
from pathlib import Path

from megactx.framework.files import replacing

from .files import without_nan
from .sheets import Sheet, console_of, markdown_sheet, number, print_sheet, target_cells
from .summary import DROPPED, OVERALL

HEADING = "in place of the block"
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


def print_report(numbers: dict, console=None) -> None:
    """Print the tables, with rich."""
    console = console_of(console)
    console.print(f"\n[bold]{_headline(numbers)}[/bold]")
    for sheet in _sheets(numbers):
        print_sheet(sheet, console)
    console.print(LEGEND, style="dim", highlight=False)
    for note in numbers["notes"]:
        console.print(f"! {note}", style="yellow", highlight=False)


def markdown(numbers: dict) -> str:
    """The same tables as Markdown."""
    lines = [f"# {_headline(numbers)}", ""]
    lines += [markdown_sheet(sheet) for sheet in _sheets(numbers)]
    lines += [LEGEND, ""] + [f"- {note}" for note in numbers["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def write_report(folder: str | Path, numbers: dict) -> None:
    """Write ``report.md`` and ``report.json``; undefined numbers are ``null`` in JSON."""
    with replacing(Path(folder) / "report.md") as part:
        part.write_text(markdown(numbers))
    with replacing(Path(folder) / "report.json") as part:
        part.write_text(json.dumps(without_nan(numbers), indent=1, allow_nan=False))


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
    if numbers["history"]:
        sheets.append(_history_sheet(numbers))
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
        rows.append([label, *[number(figures.get(key), COLUMNS[key][1]) for key in present]])
    title = f"{name}: {group['blocks']:,} blocks of {group['documents']:,} documents"
    if families := [row for row in group["rows"] if "quoted" in group["rows"][row]]:
        title += f" (* the better of {len(group['unquoted']) // len(families)} forms of {', '.join(families)})"
    return Sheet(title, [HEADING, *[COLUMNS[key][0] for key in present]], rows, (len(rows) - 1,))


def _against_sheet(numbers: dict) -> Sheet:
    subject, rows, strong, groups = numbers["subject"], [], [], dict(numbers["groups"])
    if numbers["level2"]:
        groups["level 2"] = numbers["level2"]
    for name, group in groups.items():
        strong.append(len(rows))
        own = group["recovery"][subject]
        rows.append([f"{name}: {subject}", _interval(own["all"]), "", _interval(own["body"]), ""])
        for control, spans in group["against"].items():
            if control not in group["unquoted"]:
                cells = [
                    cell for span in spans.values() for cell in (_interval(span, sign="+", digits=3), span["verdict"])
                ]
                rows.append([f"  - {control}", *cells])
    title = f"recovery of {subject}, and its difference to each control on the same blocks"
    return Sheet(title, ["", "all h", "verdict", "h >= 4", "verdict"], rows, tuple(strong))


def _copy_sheet(numbers: dict) -> Sheet:
    subject, copied = numbers["subject"], numbers["copies"].values()
    rows = [["cost of dropping, nats", *[number(part["cost"][OVERALL], "{:.3f}") for part in copied]]]
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


def _history_sheet(numbers: dict) -> Sheet:
    subject, history = numbers["subject"], numbers["history"]
    domains, rows = [name for name in history["recovery"] if name != OVERALL], []
    costs = [number(history["cost"][name]) for name in (OVERALL, *domains)]
    rows.append(["cost of no history, nats", *costs, ""])
    carriers = list(history["recovery"][OVERALL])
    for name in [*[name for name in carriers if name != subject], subject]:
        cells = [_interval(history["recovery"][group][name]) for group in (OVERALL, *domains)]
        gain = history["gain"].get(name)
        rows.append([name, *cells, _interval(gain, sign="+", digits=3) if gain else ""])
    title = (
        f"history recovery: all blocks behind the recency window compressed, {history['segments']:,} segments of"
        f" {history['tokens']} tokens, hash {history['block_hash']}"
    )
    header = ["in place of the blocks", OVERALL, *domains, "gain at equal budget, nats"]
    return Sheet(title, header, rows, (len(rows) - 1,))


def _geometry_sheet(numbers: dict) -> Sheet:
    geometry, domains = numbers["geometry"], [name for name in numbers["groups"] if name != OVERALL]
    rows = []
    for name in [name for name in geometry if "/" not in name]:
        cells = [geometry[name], *[geometry.get(f"{domain}/{name}") for domain in domains]]
        rows.append([name, *[number(cell, "{:.3f}") for cell in cells], GEOMETRY.get(name, "")])
    return Sheet("gist space", ["", OVERALL, *domains, "healthy"], rows)


def _target_sheet(numbers: dict) -> Sheet:
    rows = [target_cells(target) for target in numbers["targets"]]
    passed = sum(target["status"] == "passed" for target in numbers["targets"])
    title = f"targets: {passed} of {len(rows)} passed"
    return Sheet(title, ["", "target", numbers["subject"], DROPPED, "status"], rows)


def _interval(values: dict, sign: str = "", digits: int = 2) -> str:
    if values["point"] != values["point"]:
        return "undefined"
    form = f"{sign}.{digits}f"
    point = f"{values['point']:{form}}"
    if values["low"] != values["low"]:
        return f"{point} [undefined]"
    return f"{point} [{values['low']:{form}}, {values['high']:{form}}]"
