"""All stages of a curriculum in one table, against their targets, and in one picture."""

import json
from pathlib import Path

from megactx.framework.files import replacing

from .plots import plot_stages
from .sheets import Sheet, markdown_sheet, number, print_sheet, target_cells
from .summary import DROPPED, OVERALL

LAST_TOKEN = "last token"
NOTE = (
    "A target that the dropped block also meets is not informative: the base hardly misses the block, so it says"
    " nothing about gists, and does not count as passed. Each stage is measured on its own held-out"
    " documents and horizon."
)


def write_curriculum(folder: str | Path, stages: list[str]) -> None:
    """Print the tables and write ``curriculum.md`` and ``curriculum.png``.

    Args:
        folder: of the curriculum, with a finished run folder of each stage below it.
    """
    folder = Path(folder)
    reports = {name: json.loads((folder / name / "report.json").read_text()) for name in stages}
    sheets = [_result_sheet(reports), _target_sheet(reports)]
    for sheet in sheets:
        print_sheet(sheet)
    print(NOTE)
    with replacing(folder / "curriculum.md") as part:
        part.write_text("\n".join(["# Curriculum", "", *[markdown_sheet(sheet) for sheet in sheets], NOTE, ""]))
    curves = {name: folder / name / "metrics.csv" for name in stages}
    plot_stages(folder / "curriculum.png", {name: path for name, path in curves.items() if path.exists()})
    print(f"Tables: {folder / 'curriculum.md'}   picture: {folder / 'curriculum.png'}")


def _result_sheet(reports: dict) -> Sheet:
    header = ["stage", "H", "blocks", "dNLL", "dropped", "recovery", LAST_TOKEN, "h >= 4", LAST_TOKEN]
    rows = []
    for name, report in reports.items():
        group = report["groups"][OVERALL]
        own, control = group["rows"][report["subject"]], group["rows"][LAST_TOKEN]
        cells = [own["dnll"], group["rows"][DROPPED]["dnll"]]
        cells += [figures.get(key) for key in ("recovery", "recovery_body") for figures in (own, control)]
        rows.append([name, str(report["horizon"]), f"{report['blocks']:,}", *[number(cell) for cell in cells]])
    return Sheet("curriculum: the GistNet after each stage", header, rows)


def _target_sheet(reports: dict) -> Sheet:
    rows = [[name, *target_cells(target)] for name, report in reports.items() for target in report["targets"]]
    passed = sum(row[-1] == "passed" for row in rows)
    return Sheet(
        f"targets: {passed} of {len(rows)} passed", ["stage", "", "target", "GistNet", DROPPED, "status"], rows
    )
