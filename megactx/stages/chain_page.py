"""One page about all stages of a curriculum: what each gained, in what time, from how many tokens."""

import csv
from pathlib import Path

from omegaconf import OmegaConf

from megactx.evaluation.chat import DROPPING, FOCUS, Chatting, held_out, measure, recall_talks
from megactx.evaluation.chat import sheets as chat_sheets
from megactx.evaluation.page import with_stages, write_html
from megactx.evaluation.table import Report, Sheet, Table
from megactx.framework.files import write
from megactx.parts.models import load_models

# What a validation says, the first that a stage has: lower is better in all of them.
MEASURES = ("val/cost", "val/dnll", "val/nll", "val/loss")
CHAT = "chat_template.jinja"  # in the folder of a model that talks
MOST, TURNS, WINDOW, TOKENS = 20, 40, 512, 24  # cases, questions of a talk, entries of a window, tokens of an answer
ASKED = ("Add 12 and 30.", "Copy: river stone maple", "What is the Python package numpy?")
NOTE = (
    "First and last are of the stage's own validation, on its own held-out data: they compare a stage with its own"
    " beginning, not with another stage."
)


def write_page(folder: str | Path, stages: list[str]) -> None:
    """Print a line per stage, and write ``report.md``, ``.csv`` and ``.json`` with the reports of the stages; and
    ``report.html``, the page with its pictures for a browser. ``megactx.evaluation.page`` makes it again.

    Args:
        folder: of the curriculum, with a finished run folder of each stage below it.
    """
    folder, table, rows = Path(folder), Table(), []
    for name in stages:
        told = of_run(folder / name)
        table += [{"run": name, "metric": metric, "point": value} for metric, value in told.items() if metric != "of"]
        rows.append([name, *_cells(told)])
    talking = {name: path for name in stages if (path := folder / name / "model" / CHAT).exists()}
    header = ["stage", "minutes", "steps", "tokens", "validation", "first", "last", "best"]
    sheets = [Sheet("What each stage gained", header, rows)]
    if talking:
        cases = OmegaConf.load(folder / stages[-1] / "config.yaml").preset.report.card
        chats, sample = _chats({name: path.parent for name, path in talking.items()}, min(cases, MOST))
        table += chats
        sheets += [*chat_sheets(chats), sample]
    report = Report("From tokenizer to chat", table, sheets, NOTE, about={"stages": stages})
    report.show()
    print(report.write(folder / "report"))
    text = with_stages(report, folder)
    write(folder / "report.md", text)
    print(f"To look at: {write_html(folder, text)}")


def _chats(models: dict[str, Path], cases: int) -> tuple[Table, Sheet]:
    """How well they answer, and what the last one says."""
    held, talks, table = held_out(None, cases, embedded=False), recall_talks(-(-cases // 4), TURNS), Table()
    for name, path in models.items():
        last = load_models(str(path))
        table += measure(last, name, held, talks, WINDOW, TOKENS)
    one, kind = Chatting(last, 2 * TOKENS), FOCUS if last.gistnet else DROPPING
    asked = [{"role": "user", "content": text} for text in ASKED]
    rows = [[turn["content"], one.answer(one.session(WINDOW, kind), [turn])[0]] for turn in asked]
    rows = [[" ".join(text.split()).replace("|", "\\|") for text in row] for row in rows]
    return table, Sheet(f"What {name} says", ["asked", "answered"], rows)


def of_run(folder: Path) -> dict[str, float | str]:
    """What the files of a run say: ``seconds``, ``steps``, ``tokens``, and ``first``, ``last`` and ``best`` of what its
    validation measures, which is ``of``."""
    told: dict[str, float | str] = {}
    if (seconds := folder / "seconds.txt").exists():
        told["seconds"] = float(seconds.read_text())
    if not (curves := folder / "metrics.csv").exists():
        return told
    with curves.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    column = {name: [float(row[name]) for row in rows if row.get(name)] for name in rows[0]} if rows else {}
    for name, key in (("step", "steps"), ("train/tokens", "tokens")):
        if column.get(name):
            told[key] = max(column[name]) + (name == "step")  # steps count from 0 there
    if measure := next((name for name in MEASURES if column.get(name)), None):
        values = column[measure]
        told |= {"of": measure, "first": values[0], "last": values[-1], "best": min(values)}
    return told


def _cells(told: dict) -> list[str]:
    def shown(name: str, form: str, scale: float = 1.0) -> str:
        return format(told[name] / scale, form) if name in told else ""

    figures = [shown(name, ".3f") for name in ("first", "last", "best")]
    return [shown("seconds", ".1f", 60), shown("steps", ",.0f"), shown("tokens", ",.0f"), told.get("of", ""), *figures]
