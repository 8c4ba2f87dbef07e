"""All stages of a curriculum in one table, against their targets, and in one picture."""

import json
from pathlib import Path

from .plots import plot_stages
from .report import table_of, target_sheet
from .summary import DROPPED
from .table import OVERALL, Report, Table, pivot

LAST_TOKEN = "last token"
NOTE = (
    "A target that the dropped block also meets is not informative: the base hardly misses the block, so it says"
    " nothing about gists, and does not count as passed. Each stage is measured on its own held-out"
    " documents and horizon."
)


def of_gists(run: Path) -> bool:
    """Whether the report of a run folder is one of a gist stage, which the table is made of."""
    path = run / "report.json"
    return path.exists() and "subject" in json.loads(path.read_text(encoding="utf-8"))


def write_curriculum(folder: str | Path, stages: list[str]) -> None:
    """Print the tables and write ``curriculum.md``, ``.csv``, ``.json`` and ``.png``.

    Args:
        folder: of the curriculum, with a finished run folder of each stage below it.
    """
    folder, table = Path(folder), Table()
    reports = {name: json.loads((folder / name / "report.json").read_text()) for name in stages}
    for name, report in reports.items():
        table += [{"run": name, **row} for row in table_of(report)]
        table += [{"run": name, "metric": metric, "point": report[metric]} for metric in ("horizon", "blocks")]
    subject = next(iter(reports.values()))["subject"]

    def column(heading: str, metric: str, carrier: str = subject) -> tuple:
        return heading, {"metric": metric, "carrier": carrier, "span": None, "domain": OVERALL}, ".3f"

    columns = [("H", "horizon", "d"), ("blocks", "blocks", ",d")]
    columns += [column("dNLL", "dnll"), column(DROPPED, "dnll", DROPPED)]
    for heading, metric in (("recovery", "recovery"), ("h >= 4", "recovery_body")):
        columns += [column(heading, metric), column(LAST_TOKEN, metric, LAST_TOKEN)]
    targets = [(name, target) for name, report in reports.items() for target in report["targets"]]
    curves = {name: path for name in stages if (path := folder / name / "metrics.csv").exists()}
    sheets = [pivot("curriculum: the GistNet after each stage", table, columns, "run", "stage")]
    sheets.append(target_sheet(targets, "GistNet"))
    report = Report("Curriculum", table, sheets, NOTE, draw=lambda path: plot_stages(path, curves))
    report.show()
    print(report.write(folder / "curriculum"))
