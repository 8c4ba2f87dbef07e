"""What a run has reported, as one page for a browser, from the run's files alone: no model is loaded.

    python -m megactx.evaluation.page RUN

RUN is a run folder, that of a curriculum, whose page shows its stages, or what Weights & Biases has of a run:
``wandb/offline-run-*`` in a run folder, or the files of a run that were downloaded.
"""

import argparse
import sys
from html import escape
from pathlib import Path

import yaml

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


def page_of(folder: Path, report: Report | None, stages: list[str] = ()) -> Path:
    """Write ``report.md`` and ``report.html`` in a run folder; -> the second.

    Args:
        report: of the run; ``None``: its model card says what there is to say.
        stages: of a curriculum; each has a run folder below.

    Raises:
        ValueError: there is neither.
    """
    told = report.markdown() if report else _told(folder)
    if not told:
        raise ValueError(f"RUN={folder}: nothing in it was reported")
    text = "\n".join(filter(None, [told, *(of_stage(folder / name) for name in stages)]))
    if report:
        write(folder / "report.md", text)
    text = text if stages else "\n".join([text, *_pictures(folder, "")])
    write(folder / "report.html", in_browser(text, folder.name))
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
    folder = args.run.expanduser()
    folder = folder / "files" if (folder / "files").is_dir() else folder
    if not folder.is_dir():
        raise ValueError(f"RUN={args.run}: there is no such folder")
    config = folder / "config.yaml"
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else {}
    stages = [name for name in settings.get("curriculum") or () if (folder / name).is_dir()]
    stem = next((folder / name for name in REPORTS if (folder / f"{name}.json").exists()), None)
    report = Report.read(stem) if stem else None
    if report:
        report.show()
    print(f"To look at: {page_of(folder, report, stages)}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.evaluation.page", description=__doc__.partition("\n")[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    return run(_command, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
