"""The model card of a base LM: what it was trained on, and that it uses its context (Mitchell et al. 2019)."""

import math
from collections.abc import Iterator
from pathlib import Path

from megactx.framework.files import write

from .context_use import BEFORE, BLOCK, PASSAGE, SEGMENT
from .table import Sheet, Table, cell, pivot

SECTIONS = (  # metric, title, text, what a line is of
    (
        "loss_by_position",
        "Loss by position",
        "NLL by position of the predicted token, in windows of {length:,} tokens; the same documents in every row. A"
        " base that uses its context falls.",
        "positions",
    ),
    (
        "copy_gain",
        "A passage the second time",
        f"Gain on a real passage of {PASSAGE} tokens that came before, by distance between the end of the first and the"
        " start of the second occurrence. Control: the same passage at the same position, the first occurrence replaced"
        f" by other text of the document. {BEFORE} tokens stand in front of it.",
        "distance, tokens",
    ),
    (
        "drop_cost",
        "A block is missing",
        f"Cost of hiding a block of {BLOCK} tokens, by offset behind it; all other tokens keep their positions.",
        "offset, tokens",
    ),
    (
        "cut_cost",
        "The far context is missing",
        f"Cost of a context of the first {BLOCK} tokens and only the last so many (up to {SEGMENT - 1} more).",
        "last tokens kept",
    ),
)
FACTS = ("name", "data", "steps", "tokens", "parameters", "validation")


def model_card(facts: dict, use: Table) -> str:
    """Markdown with the header that the Hugging Face hub reads.

    Args:
        facts: ``name``, ``data`` (a sentence), ``steps``, ``tokens``, ``parameters``, ``validation`` (domain -> NLL in
            nats per token), and optionally ``license``, ``training`` (setting -> value), ``notes`` (sentences) and
            ``weights`` (of which model it began with).
        use: what ``context_use`` returned; empty where that was not measured.

    Raises:
        ValueError: a fact is missing.
    """
    if missing := [name for name in FACTS if name not in facts]:
        raise ValueError(f"model card: the facts lack {', '.join(missing)}")
    lines = ["---", *([f"license: {facts['license']}"] if "license" in facts else [])]
    lines += ["pipeline_tag: text-generation", "library_name: transformers", "tags: [megactx]", "---", ""]
    lines += [f"# {facts['name']}", ""]
    lines += [
        f"A causal language model of {facts['parameters']:,} parameters, trained from "
        f"{facts.get('weights') or 'random weights'}. It is small: its use is to be the frozen base on which gists are "
        "trained and measured, not to write text.",
        "",
        "## Training",
        "",
        f"- data: {facts['data']}",
        f"- steps: {facts['steps']:,}",
        f"- tokens seen: {facts['tokens']:,}",
        *[f"- {name}: {value}" for name, value in facts.get("training", {}).items()],
        *[f"- {note}" for note in facts.get("notes", [])],
        "",
        "## Validation loss",
        "",
        "| domain | NLL, nats per token | perplexity per token |",
        "| --- | ---: | ---: |",
        *[f"| {domain} | {nll:.3f} | {math.exp(nll):.1f} |" for domain, nll in facts["validation"].items()],
        "",
    ]
    sections = [sheet.markdown(text, level=3) for sheet, text in _sections(use)]
    if sections:
        lines += ["## How it uses its context", ""]
        lines += ["Means over held-out documents, nats per token, with 95 % intervals (bootstrap over texts).", ""]
    return "\n".join([*lines, *sections]).rstrip() + "\n"


def write_model_card(folder: str | Path, facts: dict, use: Table) -> None:
    """Write ``README.md`` into the model's folder."""
    write(Path(folder) / "README.md", model_card(facts, use))


def card_sheets(use: Table) -> list[Sheet]:
    """What ``context_use`` returned, a sheet for each measure."""
    return [sheet for sheet, _ in _sections(use)]


def _sections(use: Table) -> Iterator[tuple[Sheet, str]]:
    for metric, title, text, what in SECTIONS:
        if own := use.pick(metric=metric):
            counts = {domain: max(row["n"] for row in own.pick(domain=domain)) for domain in own.names("domain")}
            columns = [(f"{domain} ({count} documents)", {"domain": domain}, _cell) for domain, count in counts.items()]
            yield pivot(title, own, columns, "span", what), text.format(length=int(use.point(metric="length")))


def _cell(row: dict | None) -> str:
    return cell(row and {name: row[name] for name in ("point", "low", "high")}, ".3f")
