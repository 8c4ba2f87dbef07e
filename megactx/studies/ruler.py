"""Questions that need the past: accuracy over length of what is kept of a long text (RULER's tasks, equal entries).

    python -m megactx.studies.ruler --model smollm2 --tasks niah_single_1 --lengths 4096 --policies full newest needed

Each policy keeps ``--budget`` tokens of the context; question and answer prefix stand behind them. ``full`` keeps all.
Decoding is greedy. Every cell (task, length, policy) has a file that each case is added to: the same command goes on
with those missing. With ``--engine ray`` the cases are asked on all cores, or hosts, to the same answers.
"""

import argparse
import functools
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import StoppingCriteria

from megactx.data.questions import frame
from megactx.data.ruler import PROSE, TASKS, WHOLE, case, score, sentences, settled
from megactx.evaluation import rivals
from megactx.evaluation.bootstrap import mean_interval, wilson
from megactx.evaluation.pictures import legend, line, panel, picture, powers
from megactx.evaluation.rivals import BLOCK, SINK, Asked
from megactx.evaluation.table import Report, Sheet, Table, cell
from megactx.framework.files import replacing
from megactx.framework.workers import add_engine, on_all_hosts, workers
from megactx.gist.parts import find, names
from megactx.lm.identity import of_embeddings, of_net, of_weights
from megactx.parts.models import load_models

from .study import Options, command, usable

LEGEND = (
    "Score: share of references found. Solved: cases with all of them found. Held: cases with all of the needles in the"
    " window. Brackets: 95 %; of shares Wilson's, of differences by paired bootstrap over cases."
)


def options(given: Options) -> None:
    given.add("--model", help="a folder, a GGUF file, or the name of an asset; without it the embedded models")
    given.add("--tasks", nargs="+", default=["niah_single_1"], help="of " + ", ".join(TASKS))
    given.add("--lengths", nargs="+", type=int, default=[4096], help="tokens of context, question and answer")
    given.number("cases", 20, "cases of a cell")
    given.add(
        "--answers", type=int, help="of these, cases that the base answers too, not only the policy (default all)"
    )
    given.number("budget", 1024, "tokens of the context that a policy keeps", least=2 * BLOCK)
    given.number("seed", 0, "of the first case", least=0)
    given.add(
        "--solvable",
        nargs="?",
        const=NEEDED,
        metavar="POLICY",
        help="count only cases that the base solves by this policy, needed or alone; no other policy is asked the rest",
    )
    given.add("--tokens", type=int, help="of an answer, at most (default: as many as the task allows, 128 of a number)")
    given.add(
        "--shared",
        action="store_true",
        help="one history for all cases of a task and length: what a case tells takes the place of other tokens of it",
    )
    given.add(
        "--newest",
        type=int,
        metavar="TOKENS",
        help="that a session reads beside what it finds, the question among them, and that bm25_few, dense_few and"
        " needed_few read beside the question; 0: the question alone (default: all, and 128)",
    )
    given.add("--against", help="of the policies, the one with which each other is compared case by case")
    policies = "of " + ", ".join(names(rivals))
    given.add("--policies", nargs="+", default=["full", "newest", "needed"], help=policies)
    given.add("--keys", type=Path, help="folder of keys for the policy of that name (default: the model's own)")
    given.add("--plain", action="store_true", help="no chat template, where the base has one")
    given.path("prose of niah_single_2 and qa1; without it the embedded text")
    given.add("--out", type=Path, default=Path("ruler"), help="folder of the tables")
    add_engine(given.parser.add_argument)


def asked_of(
    row: dict, tokenizer, plain: bool = False, newest: int | None = None
) -> tuple[list[int], Asked, list[int]]:
    """Context's tokens, what a policy is told of them, and which of them are of needles."""
    found = tokenizer(row["context"], add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = found["input_ids"], found["offset_mapping"]
    over = [n for n, (a, b) in enumerate(offsets) if any(a < end and b > start for start, end in row["needles"])]
    blocks = [tokenizer.decode(ids[at : at + BLOCK]) for at in range(0, len(ids), BLOCK)]
    before, behind = frame(tokenizer, plain)

    def tokens(text: str, template: bool = False) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=not template)["input_ids"]

    end = [*tokens(f"\n{row['question']}"), *tokens(behind, template=True), *tokens(row["answer_prefix"])]
    begin, needed = tokens(before, template=True), sorted({n // BLOCK for n in over})
    return ids, Asked(blocks, len(ids), needed, row["question"], ids, begin, end, newest), over


class Settled(StoppingCriteria):
    """Ends an answer once its score cannot change any more: the rules allow 128 tokens, a number takes ten."""

    def __init__(self, tokenizer, row: dict, before: int):
        self.tokenizer, self.row, self.before = tokenizer, row, before

    def __call__(self, ids, scores, **_) -> torch.Tensor:
        said = self.tokenizer.decode(ids[0, self.before :], skip_special_tokens=True)
        over = settled(self.row.get("task", ""), said, self.row["answer"])
        return torch.tensor([over], device=ids.device)


@torch.no_grad()
def answer(base, row: dict, asked: Asked, kept: list[int]) -> str:
    """Greedy answer over the tokens of the context that were kept."""
    tokenizer = base.tokenizer
    window = torch.tensor([[*asked.begin, *(asked.ids[n] for n in kept), *asked.end]], device=base.model.device)
    if (total := window.shape[1] + row["max_new_tokens"]) > base.max_positions:
        raise ValueError(f"--policies: a window of {total} tokens, but the base takes {base.max_positions} positions")
    settings = {"do_sample": False, "repetition_penalty": 1.0, "pad_token_id": 0}
    settings["stopping_criteria"] = [Settled(tokenizer, row, window.shape[1])]
    mask = torch.ones_like(window)
    out = base.model.generate(window, attention_mask=mask, max_new_tokens=row["max_new_tokens"], **settings)
    return tokenizer.decode(out[0, window.shape[1] :], skip_special_tokens=True)


class Cell:
    """Task, length and policy: a row for each case, in a file that every case is added to.

    Args:
        made: what the settings name, as it is now: models, texts. A file of earlier days does not say.

    Raises:
        ValueError: the file holds another study.
    """

    def __init__(self, args: argparse.Namespace, task: str, length: int, name: str, made: dict):
        self.name, self.path = name, args.out / "cells" / f"{task}-{length}-{name}.json"
        self.about = {key: str(value) if key == "keys" else value for key, value in vars(args).items() if key in ABOUT}
        self.rows = []
        if self.path.exists():
            found = json.loads(self.path.read_text())
            there = {"shared": False} | found["about"]  # a file of earlier days does not say
            wrong = [f"{key}={there.get(key)}, not {now}" for key, now in self.about.items() if there.get(key) != now]
            then = found["about"].get("made", made)
            wrong += [f"the {what} have changed" for what in made if then.get(what) != made[what]]
            if wrong:
                raise ValueError(
                    f"--out={args.out} holds cells of other settings: {'; '.join(wrong)}; name another folder"
                )
            self.rows = found["rows"]
        self.about["made"] = made

    def has(self, number: int, answers: int, counts: bool) -> bool:
        """Whether a case is there, with its answer where that is asked for and the case counts."""
        if number >= len(self.rows):
            return False
        if (row := self.rows[number])["entries"] is None:  # it was not asked
            return not counts
        return number >= answers or row["score"] is not None

    def add(self, number: int, row: dict) -> None:
        self.rows[number : number + 1] = [row]
        with replacing(self.path) as part:
            part.write_text(json.dumps({"about": self.about, "rows": self.rows}))


NEEDED, *_ = ORACLES = ("needed", "alone")
ABOUT = ("model", "budget", "seed", "plain", "path", "keys", "shared", "newest", "tokens")
PLACES = ("model", "path", "keys")


@dataclass(frozen=True)
class Case:
    """A case that some policies are asked about. ``model``, ``path`` and ``keys`` mean the same on all hosts.

    ``solvable``: by which policy a case must be solved to count; ``None``: all count. ``solved``: whether it is, where
    that is known; what is not is asked nothing else.
    """

    task: str
    length: int
    number: int
    policies: tuple[str, ...]
    solved: bool | None
    answers: int
    budget: int
    seed: int
    plain: bool
    solvable: str | None
    shared: bool
    newest: int | None
    tokens: int | None
    model: str | None
    path: str | None
    keys: str | None


models = functools.cache(functools.partial(load_models, setting="--model"))  # of a process, which has many cases


@functools.cache
def policy(name: str, model: str | None, keys: str | None):
    kind = find(rivals, name, "--policies")
    return kind(models(model), keys and Path(keys)) if getattr(kind, "needs_models", False) else kind()


def measured(about: Case) -> tuple[dict, dict[str, dict]]:
    """The case itself, and of each policy what it keeps, and where it is asked for what the base says to that."""
    base, prose = models(about.model).base, sentences(about.path) if about.task in PROSE else []
    row = case(about.task, about.length, base.tokenizer, about.seed + about.number, prose, about.shared)
    row["max_new_tokens"] = min(row["max_new_tokens"], about.tokens or row["max_new_tokens"])
    ids, told, needles = asked_of(row, base.tokenizer, about.plain, about.newest)
    found, solved = {}, about.solved
    for name in sorted(about.policies, key=lambda name: name != about.solvable):
        if about.solvable not in (None, name) and not solved:
            found[name] = {"entries": None, "held": None, "answer": row["answer"], "said": None, "score": None}
            continue
        own = policy(name, about.model, about.keys)
        kept = own.keep(told, about.budget)
        one = {"entries": len(kept), "held": {*kept}.issuperset(needles) if needles else None}
        one |= {"answer": row["answer"], "said": None, "score": None}
        if about.number < about.answers:
            if hasattr(own, "say"):
                said = own.say(row["max_new_tokens"], lambda said: settled(about.task, said, row["answer"]))
            else:
                said = answer(base, row, told, kept)
            one |= {"said": said, "score": score(about.task, said, row["answer"])}
        found[name] = one
        solved = one["score"] == 1 if name == about.solvable else solved
    return row, found


def keep_case(out: Path, about: Case, row: dict) -> None:
    """For others that answer the same ones."""
    path = out / "cases" / f"{about.task}-{about.length}.jsonl"
    if not about.number or path.exists():
        with path.open("a" if about.number else "w") as file:
            file.write(json.dumps(row) + "\n")


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """Measure case by case.

    Raises:
        ValueError: an unknown task or policy, or lengths and budgets that do not go together; names the option.
    """
    for task in args.tasks:
        if task not in TASKS:
            raise ValueError(f"--tasks={task} is not known, allowed are {', '.join(TASKS)}")
        if task in WHOLE and (named := {*ORACLES} & {*args.policies}):
            raise ValueError(f"--policies={min(named)} is not allowed for {task}, which needs all of its context")
        if task in WHOLE and args.shared:
            raise ValueError(f"--shared is not allowed with {task}: its cases have nothing in common")
    short = min(args.lengths)
    if args.budget >= short and set(args.policies) - {"full"}:
        raise ValueError(f"--budget={args.budget} is not allowed with --lengths={short}: it must be below every length")
    args.answers = args.cases if args.answers is None else min(args.answers, args.cases)
    if args.solvable not in (None, *ORACLES):
        raise ValueError(f"--solvable={args.solvable} is not allowed, allowed are {', '.join(ORACLES)}")
    if args.solvable and (args.solvable not in args.policies or args.answers < args.cases):
        raise ValueError(
            f"--solvable is not allowed without {args.solvable} among --policies, or with fewer --answers than --cases"
        )
    for name, least in (("newest", 0), ("tokens", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"--{name}={value} is not allowed, allowed are numbers from {least} on")
    if args.against not in (None, *args.policies):
        raise ValueError(f"--against={args.against} is not allowed, allowed are those of --policies: {args.policies}")
    kinds = {name: find(rivals, name, "--policies") for name in args.policies}
    for folder in ("cells", "cases"):
        usable(args.out / folder)
    groups = [(task, length) for task in args.tasks for length in sorted(args.lengths)]
    places = {name: on_all_hosts(value and str(value)) for name, value in vars(args).items() if name in PLACES}
    same = {
        name: getattr(args, name)
        for name in ("answers", "budget", "seed", "plain", "solvable", "shared", "newest", "tokens")
    } | places
    for kept in (models, sentences, policy):
        kept.cache_clear()  # of an earlier study in this process
    for name in kinds:
        policy(name, places["model"], places["keys"])  # what is missing is said before anything is measured
    read, prose = models(places["model"]), sentences(places["path"]) if {*PROSE} & {*args.tasks} else []
    made = {"weights of the base LM": [of_embeddings(read.base), of_weights(read.base)]}
    if read.gistnet is not None:
        made["weights of the GistNet"] = of_net(read.gistnet)
    words = {"words of the text": hashlib.sha256("\0".join(prose).encode()).hexdigest()[:16]}
    cells = {
        group: [Cell(args, *group, name, made | (words if group[0] in PROSE else {})) for name in kinds]
        for group in groups
    }

    def counts(own: Cell, group: tuple[str, int], number: int) -> bool:
        return own.name == args.solvable or solved_alone(cells[group], number, args.solvable) is not False

    missing = [
        Case(*group, number, tuple(names), solved_alone(cells[group], number, args.solvable), **same)
        for group in groups
        for number in range(args.cases)
        if (
            names := [own.name for own in cells[group] if not own.has(number, args.answers, counts(own, group, number))]
        )
    ]
    table, told = Table(), []
    with workers(args.engine) as each:
        for about, (row, found) in zip(missing, each(measured, missing, "cases"), strict=True):
            group = about.task, about.length
            if told[-1:] != [group]:
                if told:
                    yield args.out / "ruler", report(tabled(table, cells, told[-1], args), args)
                told.append(group)
            keep_case(args.out, about, row)
            for own in cells[group]:
                if own.name in about.policies:
                    own.add(about.number, found[own.name])
    table = Table()
    for group in groups:
        tabled(table, cells, group, args)
    yield args.out / "ruler", report(table, args)


def solved_alone(cells: list[Cell], number: int, by: str | None) -> bool | None:
    """Whether a case is solved by the policy that ``--solvable`` names; ``None``: that is not known."""
    rows = next((own.rows for own in cells if own.name == by), [])
    found = rows[number]["score"] if number < len(rows) else None
    return None if found is None else found == 1


def tabled(table: Table, cells: dict, group: tuple[str, int], args: argparse.Namespace) -> Table:
    """The figures of a task and length, added to the table."""
    task, length = group
    counted = [n for n in range(args.cases) if not args.solvable or solved_alone(cells[group], n, args.solvable)]
    against = next((found.rows for found in cells[group] if found.name == args.against), [])
    if args.solvable:
        share = wilson(len(counted), args.cases)
        table.add("solvable", share._asdict(), n=args.cases, carrier=args.solvable, domain=task, span=length)
    for found in cells[group] if counted else ():
        rows = [found.rows[n] for n in counted if n < len(found.rows)]
        about = {"carrier": found.name, "span": length, "domain": task}
        answered = [row["score"] for row in rows if row["score"] is not None]
        held = [row["held"] for row in rows if row.get("held") is not None]
        if answered:
            table.add("score", sum(answered) / len(answered), n=len(answered), **about)
            solved = wilson(sum(value == 1 for value in answered), len(answered))
            table.add("solved", solved._asdict(), n=len(answered), **about)
        if held:
            table.add("held", wilson(sum(held), len(held))._asdict(), n=len(held), **about)
        pairs = [
            (found.rows[n]["score"], against[n]["score"]) for n in counted if n < min(map(len, (found.rows, against)))
        ]
        pairs = [(one == 1) - (other == 1) for one, other in pairs if None not in (one, other)]
        if pairs and found.name != args.against:
            less = mean_interval(torch.arange(len(pairs)), torch.tensor(pairs))
            table.add("less", less._asdict(), n=len(pairs), control=args.against, **about)
        table.add("entries", sum(row["entries"] for row in rows) / len(rows), n=len(rows), **about)
    return table


def report(table: Table, args: argparse.Namespace) -> Report:
    metrics = ("score", "solved", "held", "entries")
    heads = {"less": f"solved, less {args.against}"}
    if args.against:
        metrics = (*metrics[:2], "less", *metrics[2:])
    sheets = []
    for task in table.names("domain"):
        own = table.pick(domain=task)
        rows = [
            [name, str(length), *(cell(own.one(carrier=name, span=length, metric=m)) for m in metrics)]
            for length, name in own.names(("span", "carrier"))
        ]
        said = "" if args.answers == args.cases else f", {args.answers} of them answered"
        counted = [f"{round(r['point'] * r['n'])} at {r['span']:,}" for r in own.pick(metric="solvable")]
        said += f"; counted, for solved by {args.solvable}: {', '.join(counted)}" if counted else ""
        sheets.append(
            Sheet(
                f"{task}: {args.cases} cases a cell{said}",
                ["policy", "length", *(heads.get(m, m) for m in metrics)],
                rows,
            )
        )

    def draw(path: Path) -> None:
        tasks = table.names("domain")
        with picture(path, (5 * len(tasks), 4), columns=len(tasks)) as axes:
            for axis, task in zip(axes[0], tasks, strict=True):
                shown = "solved" if args.answers else "held"
                panel(axis, task, "tokens", shown)
                for name in table.names("carrier"):
                    own = table.pick(domain=task, carrier=name, metric=shown)
                    line(axis, [(row["span"], row) for row in own], label=name)
                powers(axis, table.names("span"))
                legend(axis)

    about = {"model": args.model, "budget": args.budget, "sink": SINK, "seed": args.seed, "plain": args.plain}
    about |= {"shared": args.shared, "newest": args.newest, "tokens": args.tokens}
    return Report(
        f"Questions that need the past: {args.model or 'the embedded models'}", table, sheets, LEGEND, [], about, draw
    )


main = command("ruler", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
