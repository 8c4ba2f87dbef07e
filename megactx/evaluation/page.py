"""What a run has reported, as one page for a browser, from the run's files alone: no model is loaded.

    python -m megactx.evaluation.page RUN

RUN is a run folder, that of a curriculum, whose page shows its stages, or what Weights & Biases has of a run:
``wandb/offline-run-*`` in a run folder, or the files of a run that were downloaded.
"""

import argparse
import sys
from html import escape
from pathlib import Path

from megactx.framework.command_line import run
from megactx.framework.files import write

from .table import Report

REPORTS = ("report", "curriculum")  # stems of what the end of a run writes
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left; white-space: normal }
td { vertical-align: top } img { max-width: 100% }
h2 { margin-top: 2.5rem; border-top: 2px solid #ddd; padding-top: 1rem }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } th, td, h2 { border-color: #444 } }
"""


def with_stages(report: Report, folder: Path) -> str:
    """Markdown of a report, and of a curriculum's also the reports of its stages, which it names as ``stages``."""
    return "\n".join(filter(None, [report.markdown(), *(of_stage(folder / name) for name in stages_of(report))]))


def stages_of(report: Report) -> list[str]:
    return list(report.about.get("stages", ()))


def write_html(folder: Path, text: str) -> Path:
    """Write ``report.html`` in a run folder, with those of its pictures that the text does not show; -> its path."""
    rest = [picture for picture in _pictures(folder, "") if picture.partition("](")[2] not in text]
    write(folder / "report.html", in_browser("\n".join([text, *rest]), folder.name))
    return folder / "report.html"


def _pictures(run: Path, where: str) -> list[str]:
    return [f"![{path.stem} of {run.name}]({where}{path.name})\n" for path in sorted(run.glob("*.png"))]


def of_stage(run: Path) -> str:
    """A stage's own report, with its headings two levels below."""
    if not (text := _told(run)):
        return ""
    lines = [f"##{line}" if line.startswith("#") else line for line in text.strip().splitlines()]
    return "\n".join([f"## Stage {run.name}", "", *lines, "", *_pictures(run, f"{run.name}/")])


def _told(run: Path) -> str:
    """A run's report, or its model card."""
    found = next((path for path in (run / "report.md", run / "model" / "README.md") if path.exists()), None)
    text = found.read_text(encoding="utf-8") if found else ""
    return text.split("---\n", 2)[2] if text.startswith("---\n") else text  # what the hub reads of a card is no text


def in_browser(text: str, name: str) -> str:
    """A page of Markdown as HTML that needs nothing but the pictures beside it."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    title = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{escape(name)}</title>"
    return f"<!doctype html><html lang='en'><head>{title}<style>{STYLE}</style></head><body>{body}</body></html>\n"


def _command(args: argparse.Namespace) -> None:
    folder = args.run.expanduser().resolve()
    folder = folder / "files" if (folder / "files").is_dir() else folder
    if not folder.is_dir():
        raise ValueError(f"RUN={args.run}: there is no such folder")
    made = next((path for stem in REPORTS if (path := folder / f"{stem}.md").exists()), None)
    stem = next((folder / name for name in REPORTS if (folder / f"{name}.json").exists()), None)
    if made:  # as it was written: a curriculum's has the reports of stages that may be elsewhere now
        text = made.read_text(encoding="utf-8")
        print(text)
    elif stem:
        report = Report.read(stem)
        report.show()
        text = with_stages(report, folder)
        write(stem.with_name(f"{stem.name}.md"), text)
        if gone := [name for name in stages_of(report) if not (folder / name).is_dir()]:
            print(f"! Not here, so without their own reports: {', '.join(gone)}")
    else:
        text = _told(folder)
    if not text:
        raise ValueError(f"RUN={args.run}: nothing in it was reported")
    print(f"To look at: {write_html(folder, text)}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.evaluation.page", description=__doc__.partition("\n")[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    return run(_command, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
