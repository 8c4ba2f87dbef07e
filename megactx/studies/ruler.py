"""Questions that need the past: accuracy over length of what is kept of a long text (RULER's tasks, equal entries).

    python -m megactx.studies.ruler --model smollm2 --tasks niah_single_1 --lengths 4096 --policies full newest needed

Each policy keeps ``--budget`` tokens of the context; question and answer prefix stand behind them. ``full`` keeps all.
Decoding is greedy. Every cell (task, length, policy) leaves a file: the same command goes on with those missing.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from megactx.data.embedded import Embedded
from megactx.data.files import NARRATIVE, Files
from megactx.data.ruler import PROSE, TASKS, WHOLE, case, score
from megactx.evaluation import rivals
from megactx.evaluation.bootstrap import wilson
from megactx.evaluation.pictures import legend, line, panel, picture, powers
from megactx.evaluation.rivals import BLOCK, SINK, Asked
from megactx.evaluation.table import Report, Sheet, Table, cell
from megactx.framework.bar import bar
from megactx.framework.files import replacing
from megactx.gist.parts import find
from megactx.parts.models import load_models

from .study import Options, command, usable

LEGEND = "Share of references found; of cases with all of them found, brackets: 95 % Wilson intervals."


def options(given: Options) -> None:
    given.add("--model", default="tiny-base", help="a folder, a GGUF file, or the name of an asset")
    given.add("--tasks", nargs="+", default=["niah_single_1"], help="of " + ", ".join(TASKS))
    given.add("--lengths", nargs="+", type=int, default=[4096], help="tokens of context, question and answer")
    given.number("cases", 20, "cases of a cell")
    given.number("budget", 1024, "tokens of the context that a policy keeps", least=2 * BLOCK)
    given.number("seed", 0, "of the first case", least=0)
    given.add("--policies", nargs="+", default=["full", "newest", "needed"], help="files of megactx/evaluation/rivals")
    given.add("--plain", action="store_true", help="no chat template, where the base has one")
    given.path("prose of niah_single_2 and qa1; without it the embedded text")
    given.add("--out", type=Path, default=Path("ruler"), help="folder of the tables")


def essay(path: str | None) -> list[str]:
    """Sentences of the prose."""
    rows = (Files(path) if path else Embedded()).load()
    text = " ".join(row["text"] for row in rows if path or row["domain"] == NARRATIVE)
    return re.split(r"(?<=[.!?])\s+", text)


def frame(tokenizer, plain: bool) -> tuple[str, str]:
    """What stands before the context and between question and answer prefix."""
    if plain or not tokenizer.chat_template:
        return "", ""
    mark = "CONTEXT"
    said = [{"role": "user", "content": mark}]
    before, _, behind = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True).partition(mark)
    return before, behind


def asked_of(row: dict, tokenizer) -> tuple[list[int], Asked]:
    """Context's tokens and what a policy is told of them."""
    found = tokenizer(row["context"], add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = found["input_ids"], found["offset_mapping"]
    over = [n for n, (a, b) in enumerate(offsets) if any(a < end and b > start for start, end in row["needles"])]
    blocks = [tokenizer.decode(ids[at : at + BLOCK]) for at in range(0, len(ids), BLOCK)]
    return ids, Asked(blocks, len(ids), sorted({n // BLOCK for n in over}), row["question"])


@torch.no_grad()
def answer(base, row: dict, policy, budget: int, plain: bool) -> tuple[str, int]:
    """Greedy answer and the entries of the context that were kept."""
    tokenizer = base.tokenizer
    ids, asked = asked_of(row, tokenizer)
    kept = policy.keep(asked, budget)
    before, behind = frame(tokenizer, plain)

    def tokens(text: str, template: bool = False) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=not template)["input_ids"]

    end = [*tokens(f"\n{row['question']}"), *tokens(behind, template=True), *tokens(row["answer_prefix"])]
    begin = tokens(before, template=True)
    window = torch.tensor([[*begin, *(ids[n] for n in kept), *end]], device=base.model.device)
    if (total := window.shape[1] + row["max_new_tokens"]) > base.max_positions:
        raise ValueError(f"--policies: a window of {total} tokens, but the base takes {base.max_positions} positions")
    settings = {"do_sample": False, "repetition_penalty": 1.0, "pad_token_id": 0}
    mask = torch.ones_like(window)
    out = base.model.generate(window, attention_mask=mask, max_new_tokens=row["max_new_tokens"], **settings)
    return tokenizer.decode(out[0, window.shape[1] :], skip_special_tokens=True), len(kept)


def measured(base, args, task: str, length: int, name: str, policy, prose: list[str]) -> dict:
    """A cell, from its file where there is one."""
    path = args.out / "cells" / f"{task}-{length}-{name}.json"
    about = {key: getattr(args, key) for key in ("model", "cases", "budget", "seed", "plain", "path")}
    if path.exists():
        found = json.loads(path.read_text())
        if found["about"] != about:
            raise ValueError(f"--out={args.out} holds cells of other settings: {found['about']}; name another folder")
        return found
    questions = [case(task, length, base.tokenizer, args.seed + number, prose) for number in range(args.cases)]
    with replacing(args.out / "cases" / f"{task}-{length}.jsonl") as part:  # for others that answer the same ones
        part.write_text("".join(json.dumps(row) + "\n" for row in questions))
    rows = []
    for row in questions:
        said, entries = answer(base, row, policy, args.budget, args.plain)
        rows.append(
            {"score": score(task, said, row["answer"]), "entries": entries, "said": said, "answer": row["answer"]}
        )
    with replacing(path) as part:
        part.write_text(json.dumps({"about": about, "rows": rows}))
    return {"rows": rows}


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """Measure cell by cell.

    Raises:
        ValueError: an unknown task or policy, or lengths and budgets that do not go together; names the option.
    """
    for task in args.tasks:
        if task not in TASKS:
            raise ValueError(f"--tasks={task} is not known, allowed are {', '.join(TASKS)}")
        if task in WHOLE and "needed" in args.policies:
            raise ValueError(f"--policies=needed is not allowed for {task}, which needs all of its context")
    short = min(args.lengths)
    if args.budget >= short and set(args.policies) - {"full"}:
        raise ValueError(f"--budget={args.budget} is not allowed with --lengths={short}: it must be below every length")
    policies = {name: find(rivals, name, "--policies")() for name in args.policies}
    for folder in ("cells", "cases"):
        usable(args.out / folder)
    base = load_models(args.model).base
    prose = essay(args.path) if {*PROSE} & {*args.tasks} else []
    cells = [(t, n, p) for t in args.tasks for n in sorted(args.lengths) for p in policies]
    table = Table()
    for task, length, name in bar("cells")(cells):
        rows = measured(base, args, task, length, name, policies[name], prose)["rows"]
        about = {"carrier": name, "span": length, "domain": task, "n": len(rows)}
        table.add("score", sum(row["score"] for row in rows) / len(rows), **about)
        table.add("solved", wilson(sum(row["score"] == 1 for row in rows), len(rows))._asdict(), **about)
        table.add("entries", sum(row["entries"] for row in rows) / len(rows), **about)
        yield args.out / "ruler", report(table, args)


def report(table: Table, args: argparse.Namespace) -> Report:
    metrics = ("score", "solved", "entries")
    sheets = []
    for task in table.names("domain"):
        own = table.pick(domain=task)
        rows = [
            [name, str(length), *(cell(own.one(carrier=name, span=length, metric=m)) for m in metrics)]
            for length, name in own.names(("span", "carrier"))
        ]
        sheets.append(Sheet(f"{task}: {args.cases} cases a cell", ["policy", "length", *metrics], rows))

    def draw(path: Path) -> None:
        tasks = table.names("domain")
        with picture(path, (5 * len(tasks), 4), columns=len(tasks)) as axes:
            for axis, task in zip(axes[0], tasks, strict=True):
                panel(axis, task, "tokens", "solved")
                for name in table.names("carrier"):
                    own = table.pick(domain=task, carrier=name, metric="solved")
                    line(axis, [(row["span"], row) for row in own], label=name)
                powers(axis, table.names("span"))
                legend(axis)

    about = {"model": args.model, "budget": args.budget, "sink": SINK, "seed": args.seed, "plain": args.plain}
    return Report(f"Questions that need the past: {args.model}", table, sheets, LEGEND, [], about, draw)


main = command("ruler", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
